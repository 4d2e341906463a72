//! Binding: every tensor that a config asks for to exactly one tensor of the checkpoint, and none left over. The
//! official code loads leniently and leaves random weights where a name is missing; this is strict instead.

use super::{Checkpoint, TensorView, escape};
use crate::error::{Error, Result};
use std::collections::HashMap;

/// The part of the model that a tensor belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// `embed_tokens`.
    Embedding,
    /// Decoder layers and the final norm.
    Backbone,
    /// `lm_head` and `before_lm_head`: text only, not used for image tokens.
    LmHead,
    /// `image_in_projector` and `image_out_projector`.
    Projectors,
    /// `gen_pos_embed`.
    PositionTable,
    /// `image_head`: the flow-matching head.
    FlowHead,
    /// VAE encoder: images to latents.
    VaeEncoder,
    /// VAE decoder: latents to images.
    VaeDecoder,
}

/// A tensor that follows from a config.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Official name.
    pub name: String,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// What it belongs to.
    pub part: Part,
}

impl TensorSpec {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// A [`TensorSpec`] with what else it may look like in a file.
pub(super) struct Expected {
    pub(super) spec: TensorSpec,
    /// Other names of the same tensor.
    pub(super) aliases: Vec<String>,
    /// Whether it may be missing.
    pub(super) optional: bool,
    /// Whether the file may append `[1, 1]` to the shape: a linear layer stored as a 1x1 convolution.
    pub(super) pointwise: bool,
}

impl Expected {
    /// The names a reader should look for.
    fn names(&self) -> String {
        let names: Vec<_> =
            std::iter::once(&self.spec.name).chain(&self.aliases).map(String::as_str).collect();
        names.join(" or ")
    }
}

/// The bound tensors.
pub(super) struct Slots {
    specs: Vec<TensorSpec>,
    /// Official name -> (index into `specs`, index into the checkpoint's tensors).
    by_name: HashMap<String, (usize, usize)>,
}

impl Slots {
    /// Binds `expected` to the tensors of `checkpoint`. An error names the first tensor that is missing, twice
    /// there (under two of its names), of another shape, or not expected.
    pub(super) fn bind(checkpoint: &Checkpoint, expected: Vec<Expected>) -> Result<Slots> {
        let mut used = vec![false; checkpoint.len()];
        let mut slots = Slots { specs: Vec::new(), by_name: HashMap::new() };
        for expected in expected {
            let names = std::iter::once(&expected.spec.name).chain(&expected.aliases);
            let mut found = names.filter_map(|name| checkpoint.position(name));
            let Some(index) = found.next() else {
                if expected.optional {
                    continue;
                }
                return Err(Error::MissingTensor { path: checkpoint.path.clone(), tensor: expected.names() });
            };
            if let Some(second) = found.next() {
                return Err(Error::DuplicateTensor {
                    tensor: expected.names(),
                    first: checkpoint.file_of(index).to_owned(),
                    second: checkpoint.file_of(second).to_owned(),
                });
            }
            let (stored, shape) = (&checkpoint.tensors[index], &expected.spec.shape);
            let pointwise = expected.pointwise && stored.shape.strip_suffix(&[1, 1]) == Some(shape);
            if stored.shape != *shape && !pointwise {
                return Err(Error::ShapeMismatch {
                    path: checkpoint.file_of(index).to_owned(),
                    tensor: escape(&stored.name),
                    expected: shape.clone(),
                    found: stored.shape.clone(),
                });
            }
            used[index] = true;
            slots.by_name.insert(expected.spec.name.clone(), (slots.specs.len(), index));
            slots.specs.push(expected.spec);
        }
        if let Some(index) = used.iter().position(|used| !used) {
            let (path, tensor) =
                (checkpoint.file_of(index).to_owned(), escape(&checkpoint.tensors[index].name));
            return Err(Error::UnexpectedTensor { path, tensor });
        }
        Ok(slots)
    }

    /// The bound tensors, in the order of execution.
    pub(super) fn specs(&self) -> &[TensorSpec] {
        &self.specs
    }

    pub(super) fn find<'a>(&'a self, checkpoint: &'a Checkpoint, name: &str) -> Option<TensorView<'a>> {
        let &(spec, index) = self.by_name.get(name)?;
        let spec = &self.specs[spec];
        // Official name and shape, whatever the file calls it.
        Some(TensorView { name: &spec.name, shape: &spec.shape, ..checkpoint.view(index) })
    }
}

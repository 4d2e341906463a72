//! The memory plan of a session: named buffers with lifetimes, packed into one allocation.
//!
//! Everything is sized before anything is allocated. Two buffers share bytes only when their lifetimes are
//! disjoint; tests fill a buffer with NaN when its planned life ends, so that a wrong lifetime shows.

use crate::device::{Buffer, Device, Span};
use crate::error::{Error, Result};

/// Stages of one generation, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Prompt tokens through the transformer.
    Prefill,
    /// The token loop.
    Decode,
    /// Latents to pixels.
    Image,
    /// Between two generations in the same memory.
    Idle,
}

/// First and last stage in which a buffer holds something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Life {
    /// First stage.
    pub from: Stage,
    /// Last stage.
    pub to: Stage,
}

impl Life {
    /// From the first stage to the last.
    pub const ALWAYS: Life = Life { from: Stage::Prefill, to: Stage::Image };

    /// From the first stage into the next generation in the same memory.
    pub const KEPT: Life = Life { from: Stage::Prefill, to: Stage::Idle };

    /// One stage only.
    pub const fn only(stage: Stage) -> Life {
        Life { from: stage, to: stage }
    }

    /// From one stage to another.
    pub const fn between(from: Stage, to: Stage) -> Life {
        Life { from, to }
    }

    fn meets(self, other: Life) -> bool {
        self.from <= other.to && other.from <= self.to
    }
}

/// Handle of a planned buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot(usize);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Planned {
    label: String,
    offset: usize,
    bytes: usize,
    life: Life,
}

/// Buffers planned so far. Equal layouts put equal buffers in equal places.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    planned: Vec<Planned>,
    bytes: usize,
}

/// Every buffer starts at a multiple of this, as a fresh allocation would.
const ALIGNMENT: usize = 256;

impl Layout {
    /// Plans `elements` of `element_bytes` each; lowest address that is free for the whole of `life`.
    pub fn add(&mut self, label: &str, elements: usize, element_bytes: usize, life: Life) -> Result<Slot> {
        let too_large =
            || Error::Internal(format!("buffer {label}: {elements} x {element_bytes} bytes overflow"));
        let bytes = elements.checked_mul(element_bytes).ok_or_else(too_large)?;
        let padded = bytes.max(1).checked_next_multiple_of(ALIGNMENT).ok_or_else(too_large)?;
        let mut taken: Vec<(usize, usize)> = self
            .planned
            .iter()
            .filter(|p| p.life.meets(life))
            .map(|p| (p.offset, p.offset + p.bytes.max(1).next_multiple_of(ALIGNMENT)))
            .collect();
        taken.sort_unstable();
        let mut offset = 0;
        for (start, end) in taken {
            if offset + padded <= start {
                break;
            }
            offset = offset.max(end);
        }
        self.bytes = self.bytes.max(offset.checked_add(padded).ok_or_else(too_large)?);
        self.planned.push(Planned { label: label.into(), offset, bytes, life });
        Ok(Slot(self.planned.len() - 1))
    }

    /// Bytes of the allocation.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Allocates what was planned.
    pub fn bind(self, device: &dyn Device, label: &str) -> Result<Arena> {
        let buffer = device.alloc(self.bytes.max(ALIGNMENT), label)?;
        for p in &self.planned {
            // Names matter to audits of single launches; where lives overlap in memory the last one wins.
            device.name_span(Span { ptr: buffer.ptr().offset(p.offset), bytes: p.bytes }, &p.label);
        }
        Ok(Arena { layout: self, buffer })
    }
}

/// A bound [`Layout`].
pub struct Arena {
    layout: Layout,
    buffer: Buffer,
}

impl Arena {
    /// Where a planned buffer is.
    pub fn span(&self, slot: Slot) -> Span {
        let p = &self.layout.planned[slot.0];
        Span { ptr: self.buffer.ptr().offset(p.offset), bytes: p.bytes }
    }

    /// Where everything is in it.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// All of it.
    pub fn whole(&self) -> Span {
        self.buffer.span()
    }

    /// Everything but the buffers that live on into the next generation, in as few pieces as there can be.
    pub fn left_behind(&self) -> Vec<Span> {
        let kept = self.layout.planned.iter().filter(|p| p.life.to == Stage::Idle);
        let mut kept: Vec<(usize, usize)> = kept.map(|p| (p.offset, p.offset + p.bytes)).collect();
        kept.sort_unstable();
        let mut pieces = Vec::with_capacity(kept.len() + 1);
        let mut start = 0;
        for (from, to) in kept.into_iter().chain([(self.buffer.bytes(), self.buffer.bytes())]) {
            if from > start {
                pieces.push(self.buffer.span().slice(start, from - start));
            }
            start = to;
        }
        pieces
    }

    /// The buffers whose life ends with `stage`.
    pub fn dying_after(&self, stage: Stage) -> impl Iterator<Item = Span> + '_ {
        self.layout
            .planned
            .iter()
            .filter(move |p| p.life.to == stage)
            .map(|p| Span { ptr: self.buffer.ptr().offset(p.offset), bytes: p.bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_disjoint_lives_share_bytes() {
        let mut layout = Layout::default();
        let lives = [
            Life::only(Stage::Prefill),
            Life::ALWAYS,
            Life::only(Stage::Image),
            Life::between(Stage::Prefill, Stage::Decode),
            Life::only(Stage::Decode),
        ];
        let slots: Vec<Slot> =
            (0..20).map(|i| layout.add("b", 100 + 37 * i, 4, lives[i % lives.len()]).unwrap()).collect();
        for (i, a) in layout.planned.iter().enumerate() {
            assert!(a.offset % ALIGNMENT == 0 && a.offset + a.bytes <= layout.bytes());
            for b in &layout.planned[i + 1..] {
                let apart = a.offset + a.bytes <= b.offset || b.offset + b.bytes <= a.offset;
                assert!(apart || !a.life.meets(b.life), "{a:?} {b:?}");
            }
        }
        let sum: usize = layout.planned.iter().map(|p| p.bytes).sum();
        assert!(layout.bytes() < sum, "nothing was shared: {} of {sum}", layout.bytes());
        assert_eq!(slots.len(), 20);
    }

    #[test]
    fn what_is_left_behind_is_all_but_what_is_kept() {
        let mut layout = Layout::default();
        let lives = [Life::ALWAYS, Life::KEPT, Life::KEPT, Life::only(Stage::Decode), Life::KEPT];
        let slots: Vec<Slot> = lives
            .iter()
            .enumerate()
            .map(|(i, &life)| layout.add("b", 100 + 37 * i, 4, life).unwrap())
            .collect();
        let device = crate::device::paper::PaperDevice::new(1);
        let arena = layout.bind(&device, "arena").unwrap();
        let pieces = arena.left_behind();
        for (slot, life) in slots.iter().zip(lives) {
            let covered = pieces.iter().any(|piece| piece.overlaps(&arena.span(*slot)));
            assert_eq!(covered, life != Life::KEPT, "{life:?}");
        }
        let bytes = |spans: &[Span]| spans.iter().map(|span| span.bytes).sum::<usize>();
        let kept: Vec<Span> = [1, 2, 4].map(|i: usize| arena.span(slots[i])).into();
        assert_eq!(bytes(&pieces) + bytes(&kept), arena.whole().bytes);
        assert!(arena.dying_after(Stage::Image).all(|span| kept.iter().all(|k| !k.overlaps(&span))));
    }

    #[test]
    fn sizes_that_overflow_are_errors() {
        let mut layout = Layout::default();
        assert!(layout.add("huge", usize::MAX / 2, 4, Life::ALWAYS).is_err());
        assert!(layout.add("huge", usize::MAX - 3, 1, Life::ALWAYS).is_err());
    }
}

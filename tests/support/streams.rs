//! Launches of tests. What all of them would have to promise again and again is promised here.

use std::sync::Arc;
use warpstep::Result;
use warpstep::device::{Executable, Node, NodeList, Stream};

/// [`Stream`] for tests that make nodes of buffers which they hold until they have seen the result. Nodes that are
/// wrong on purpose are refused before they run, run on a stub that does nothing, or are wrong within these buffers.
pub trait TestStream {
    fn start(&mut self, node: &Node) -> Result<()>;
    fn prepare(&mut self, list: impl Into<Arc<NodeList>>) -> Result<Box<dyn Executable>>;
}

impl TestStream for dyn Stream + '_ {
    fn start(&mut self, node: &Node) -> Result<()> {
        // SAFETY: see the trait.
        unsafe { self.launch(node) }
    }

    fn prepare(&mut self, list: impl Into<Arc<NodeList>>) -> Result<Box<dyn Executable>> {
        // SAFETY: see the trait.
        unsafe { self.instantiate(list.into()) }
    }
}

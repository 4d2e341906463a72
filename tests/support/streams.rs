//! Launches and copies of tests. What all of them would have to promise again and again is promised here.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::sync::Arc;
use warpstep::Result;
use warpstep::device::{DevicePtr, Executable, Node, NodeList, Span, Stream};

/// [`Stream`] for tests that make nodes of buffers which they hold until they have seen the result. Nodes that are
/// wrong on purpose are refused before they run, run on a stub that does nothing, or are wrong within these buffers.
/// Copies are of such buffers too, or refused; tables hold what kernels take.
pub trait TestStream {
    fn start(&mut self, node: &Node) -> Result<()>;
    fn prepare(&mut self, list: impl Into<Arc<NodeList>>) -> Result<Box<dyn Executable>>;
    fn put(&mut self, dst: DevicePtr, bytes: &[u8]) -> Result<()>;
    fn put_with(
        &mut self,
        dst: DevicePtr,
        bytes: usize,
        fill: &mut dyn FnMut(&mut [u8]) -> Result<()>,
    ) -> Result<()>;
    fn get(&mut self, src: DevicePtr, bytes: &mut [u8]) -> Result<()>;
    fn set(&mut self, span: Span, byte: u8) -> Result<()>;
    fn set_rows(&mut self, first: Span, pitch_bytes: usize, rows: usize, byte: u8) -> Result<()>;
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

    fn put(&mut self, dst: DevicePtr, bytes: &[u8]) -> Result<()> {
        // SAFETY: see the trait.
        unsafe { self.upload(dst, bytes) }
    }

    fn put_with(
        &mut self,
        dst: DevicePtr,
        bytes: usize,
        fill: &mut dyn FnMut(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        // SAFETY: see the trait.
        unsafe { self.upload_with(dst, bytes, fill) }
    }

    fn get(&mut self, src: DevicePtr, bytes: &mut [u8]) -> Result<()> {
        // SAFETY: see the trait.
        unsafe { self.download(src, bytes) }
    }

    fn set(&mut self, span: Span, byte: u8) -> Result<()> {
        // SAFETY: see the trait.
        unsafe { self.fill(span, byte) }
    }

    fn set_rows(&mut self, first: Span, pitch_bytes: usize, rows: usize, byte: u8) -> Result<()> {
        // SAFETY: see the trait.
        unsafe { self.fill_rows(first, pitch_bytes, rows, byte) }
    }
}

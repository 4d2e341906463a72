//! A device of paper: it hands out addresses, lets a generation be set up, and computes nothing.
//!
//! With it the node lists of any model can be recorded, counted and priced on any machine: the 14B model takes no
//! memory here. It differs from [`planning`](super::planning) in that uploads and set-up launches are dropped rather
//! than refused; replaying and reading back are errors, so that nobody mistakes it for a device that ran.

use super::planning::PlanningDevice;
use super::{
    Buffer, Device, DeviceInfo, DevicePtr, Event, Executable, Node, NodeList, Span, Stream, check_staging,
};
use crate::error::{Error, Result};
use std::sync::Arc;

/// A device that records and never runs.
#[derive(Debug)]
pub struct PaperDevice {
    addresses: PlanningDevice,
}

impl PaperDevice {
    /// A device that says it has `sm_count` SMs, by which grids are sized: 132 on an H100.
    pub fn new(sm_count: u32) -> PaperDevice {
        PaperDevice { addresses: PlanningDevice::new(sm_count) }
    }
}

// SAFETY: nothing runs.
unsafe impl Device for PaperDevice {
    fn info(&self) -> DeviceInfo {
        DeviceInfo { kind: "paper", name: "paper: records, computes nothing".into(), ..self.addresses.info() }
    }

    fn alloc(&self, bytes: usize, label: &str) -> Result<Buffer> {
        self.addresses.alloc(bytes, label)
    }

    fn holds_data(&self) -> bool {
        false
    }

    fn name_span(&self, _span: Span, _label: &str) {}

    fn stream(&self) -> Result<Box<dyn Stream>> {
        Ok(Box::new(PaperStream))
    }
}

/// Takes uploads and set-up launches, which nobody can see the effect of; refuses to answer.
struct PaperStream;

fn refuse<T>(call: &str) -> Result<T> {
    Err(Error::Device(format!("{call} on a device of paper, which computes nothing")))
}

impl Stream for PaperStream {
    unsafe fn upload_with(
        &mut self,
        _dst: DevicePtr,
        bytes: usize,
        _fill: &mut dyn FnMut(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        check_staging(bytes)
    }

    unsafe fn download(&mut self, _src: DevicePtr, _bytes: &mut [u8]) -> Result<()> {
        refuse("download")
    }

    unsafe fn fill(&mut self, _span: Span, _byte: u8) -> Result<()> {
        Ok(())
    }

    unsafe fn launch(&mut self, _node: &Node) -> Result<()> {
        Ok(())
    }

    unsafe fn instantiate(&mut self, _list: Arc<NodeList>) -> Result<Box<dyn Executable>> {
        refuse("instantiate")
    }

    fn replay(&mut self, _executable: &dyn Executable) -> Result<()> {
        refuse("replay")
    }

    fn record(&mut self) -> Result<Box<dyn Event>> {
        refuse("record")
    }

    fn record_timed(&mut self) -> Result<Box<dyn Event>> {
        refuse("record_timed")
    }

    fn synchronize(&mut self) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Copies;

    #[test]
    fn addresses_are_apart_and_nothing_is_answered_for() {
        let device = PaperDevice::new(132);
        let a = device.alloc(300, "a").unwrap();
        let b = device.alloc(1 << 40, "b").unwrap();
        assert!(!a.span().overlaps(&b.span()) && b.ptr().0.is_multiple_of(256));
        let mut stream = device.stream().unwrap();
        assert!(stream.put(a.span(), &[1]).is_ok() && stream.synchronize().is_ok());
        assert!(stream.get(a.span(), &mut [0]).is_err() && stream.record().is_err());
    }
}

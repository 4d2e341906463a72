//! A device with addresses and no memory, for engines that only plan: weights are counted instead of copied, and
//! whatever would run is an error.

use super::{Buffer, Device, DeviceInfo, DevicePtr, Event, Executable, Node, NodeList, Span, Stream};
use crate::error::{Error, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// SMs of an H100 SXM and an H200.
pub const HOPPER_SMS: u32 = 132;

/// Hands out addresses that nothing is behind.
#[derive(Debug)]
pub struct PlanningDevice {
    sm_count: u32,
    next: AtomicU64,
}

impl PlanningDevice {
    /// Stands for a GPU with `sm_count` SMs, on which the size of some buffers depends.
    pub fn new(sm_count: u32) -> PlanningDevice {
        PlanningDevice { sm_count, next: AtomicU64::new(ALIGN) }
    }
}

const ALIGN: u64 = 256;

// SAFETY: nothing runs.
unsafe impl Device for PlanningDevice {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            kind: "planning",
            name: format!("plan for {} SMs", self.sm_count),
            sm_count: self.sm_count,
            memory_bytes: None,
            l2_bytes: None,
        }
    }

    fn alloc(&self, bytes: usize, label: &str) -> Result<Buffer> {
        let padded = (bytes as u64).max(1).checked_next_multiple_of(ALIGN);
        let take = |next: u64| padded.and_then(|padded| next.checked_add(padded));
        let ptr = self.next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
        let ptr = ptr.map_err(|_| Error::OutOfMemory {
            what: label.into(),
            requested_bytes: bytes as u64,
            free_bytes: 0,
        })?;
        // SAFETY: addresses that were not given out before, of a device that runs nothing.
        Ok(unsafe { Buffer::new(DevicePtr(ptr), bytes, Arc::new(())) })
    }

    fn holds_data(&self) -> bool {
        false
    }

    fn name_span(&self, _span: Span, _label: &str) {}

    fn stream(&self) -> Result<Box<dyn Stream>> {
        Ok(Box::new(PlanningStream))
    }
}

struct PlanningStream;

fn refuse<T>() -> Result<T> {
    Err(Error::Device("this engine was loaded to plan; it holds no weights and runs nothing".into()))
}

impl Stream for PlanningStream {
    unsafe fn upload_with(
        &mut self,
        _dst: DevicePtr,
        _bytes: usize,
        _fill: &mut dyn FnMut(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        refuse()
    }

    unsafe fn download(&mut self, _src: DevicePtr, _bytes: &mut [u8]) -> Result<()> {
        refuse()
    }

    unsafe fn fill(&mut self, _span: Span, _byte: u8) -> Result<()> {
        refuse()
    }

    unsafe fn launch(&mut self, _node: &Node) -> Result<()> {
        refuse()
    }

    unsafe fn instantiate(&mut self, _list: Arc<NodeList>) -> Result<Box<dyn Executable>> {
        refuse()
    }

    fn replay(&mut self, _executable: &dyn Executable) -> Result<()> {
        refuse()
    }

    fn record(&mut self) -> Result<Box<dyn Event>> {
        refuse()
    }

    fn record_timed(&mut self) -> Result<Box<dyn Event>> {
        refuse()
    }

    /// Nothing was enqueued.
    fn synchronize(&mut self) -> Result<()> {
        Ok(())
    }
}

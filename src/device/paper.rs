//! A device of paper: it hands out addresses, keeps their names, and computes nothing.
//!
//! With it the node lists of any model can be recorded, counted and priced on any machine: the 14B model takes no
//! memory here. Set-up launches are dropped; replaying and reading back are errors, so that nobody mistakes it for a
//! device that ran.

use super::{Buffer, Device, DeviceInfo, DevicePtr, Event, Executable, Node, NodeList, Span, Stream};
use crate::error::{Error, Result};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Where addresses start: never null.
const FIRST_ADDRESS: u64 = 1 << 20;

/// Alignment of allocations, as of every device.
const ALIGNMENT: u64 = 256;

/// A device that records and never runs.
pub struct PaperDevice {
    sm_count: u32,
    next: AtomicU64,
    names: Mutex<Vec<(Span, String)>>,
}

impl PaperDevice {
    /// A device that says it has `sm_count` SMs, by which grids are sized: 132 on an H100.
    pub fn new(sm_count: u32) -> PaperDevice {
        PaperDevice { sm_count, next: AtomicU64::new(FIRST_ADDRESS), names: Mutex::default() }
    }

    /// Bytes handed out so far; nothing is ever taken back.
    pub fn allocated_bytes(&self) -> u64 {
        self.next.load(Ordering::Relaxed) - FIRST_ADDRESS
    }

    /// The allocation that holds `span`, by its label.
    pub fn label(&self, span: Span) -> Option<String> {
        let names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        names.iter().find(|(whole, _)| whole.overlaps(&span)).map(|(_, label)| label.clone())
    }
}

impl Device for PaperDevice {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            kind: "paper",
            name: "paper: records, computes nothing".into(),
            sm_count: self.sm_count,
            memory_bytes: None,
        }
    }

    fn alloc(&self, bytes: usize, label: &str) -> Result<Buffer> {
        let room = (bytes.max(1) as u64).checked_next_multiple_of(ALIGNMENT);
        let too_large = || Error::OutOfMemory {
            what: format!("paper buffer {label}"),
            requested_bytes: bytes as u64,
            free_bytes: 0,
        };
        let room = room.filter(|&room| room < 1 << 48).ok_or_else(too_large)?;
        let ptr = DevicePtr(self.next.fetch_add(room, Ordering::Relaxed));
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        names.push((Span { ptr, bytes }, label.into()));
        Ok(Buffer::new(ptr, bytes, Arc::new(())))
    }

    fn name_span(&self, _span: Span, _label: &str) {}

    fn stream(&self) -> Result<Box<dyn Stream>> {
        Ok(Box::new(PaperStream))
    }
}

/// Takes uploads and set-up launches, which nobody can see the effect of; refuses to answer.
struct PaperStream;

fn refuse(call: &str) -> Error {
    Error::Device(format!("{call} on a device of paper, which computes nothing"))
}

impl Stream for PaperStream {
    fn upload(&mut self, _dst: DevicePtr, _bytes: &[u8]) -> Result<()> {
        Ok(())
    }

    fn download(&mut self, _src: DevicePtr, _bytes: &mut [u8]) -> Result<()> {
        Err(refuse("download"))
    }

    fn fill(&mut self, _span: Span, _byte: u8) -> Result<()> {
        Ok(())
    }

    fn launch(&mut self, _node: &Node) -> Result<()> {
        Ok(())
    }

    fn instantiate(&mut self, _list: Arc<NodeList>) -> Result<Box<dyn Executable>> {
        Err(refuse("instantiate"))
    }

    fn replay(&mut self, _executable: &dyn Executable) -> Result<()> {
        Err(refuse("replay"))
    }

    fn record(&mut self) -> Result<Box<dyn Event>> {
        Err(refuse("record"))
    }

    fn record_timed(&mut self) -> Result<Box<dyn Event>> {
        Err(refuse("record_timed"))
    }

    fn synchronize(&mut self) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_apart_named_and_never_answered_for() {
        let device = PaperDevice::new(132);
        let a = device.alloc(300, "a").unwrap();
        let b = device.alloc(1 << 40, "b").unwrap();
        assert!(!a.span().overlaps(&b.span()) && b.ptr().0.is_multiple_of(256));
        assert_eq!(device.label(b.span().slice(1 << 30, 8)).as_deref(), Some("b"));
        assert_eq!(device.allocated_bytes(), 512 + (1 << 40));
        assert!(device.alloc(usize::MAX, "c").is_err());
        let mut stream = device.stream().unwrap();
        assert!(stream.download(a.ptr(), &mut [0]).is_err() && stream.record().is_err());
    }
}

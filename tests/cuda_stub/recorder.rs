//! A device around a device that notes what the executor asks for.

use std::any::Any;
use std::sync::{Arc, Mutex};
use warpstep::Result;
use warpstep::device::{
    Buffer, Device, DeviceInfo, DevicePtr, Event, Executable, Node, NodeList, Span, Stream,
};

#[derive(Default)]
pub struct Record {
    /// Every allocation, in order.
    pub allocations: Vec<Span>,
    /// Launches, new executables and their replays, in order.
    pub work: Vec<Work>,
    executables: usize,
}

pub enum Work {
    Launch(Box<Node>),
    Instantiate(Arc<NodeList>),
    /// Of the executable of this number.
    Replay(usize),
    /// Of a node of an executable.
    SetParams,
}

pub struct Recorder {
    inner: Arc<dyn Device>,
    pub record: Arc<Mutex<Record>>,
}

struct RecordingStream {
    inner: Box<dyn Stream>,
    record: Arc<Mutex<Record>>,
}

struct Numbered {
    inner: Box<dyn Executable>,
    record: Arc<Mutex<Record>>,
    number: usize,
}

impl Recorder {
    pub fn new(inner: Arc<dyn Device>) -> Recorder {
        Recorder { inner, record: Arc::default() }
    }
}

// SAFETY: the inner device does everything.
unsafe impl Device for Recorder {
    fn info(&self) -> DeviceInfo {
        self.inner.info()
    }

    fn alloc(&self, bytes: usize, label: &str) -> Result<Buffer> {
        let buffer = self.inner.alloc(bytes, label)?;
        self.record.lock().unwrap().allocations.push(buffer.span());
        Ok(buffer)
    }

    fn name_span(&self, span: Span, label: &str) {
        self.inner.name_span(span, label);
    }

    fn stream(&self) -> Result<Box<dyn Stream>> {
        Ok(Box::new(RecordingStream { inner: self.inner.stream()?, record: self.record.clone() }))
    }
}

impl Executable for Numbered {
    unsafe fn set_params(&mut self, index: usize, node: &Node) -> Result<()> {
        self.record.lock().unwrap().work.push(Work::SetParams);
        // SAFETY: promised by the caller.
        unsafe { self.inner.set_params(index, node) }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Stream for RecordingStream {
    unsafe fn upload_with(
        &mut self,
        dst: DevicePtr,
        bytes: usize,
        fill: &mut dyn FnMut(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        // SAFETY: promised by the caller.
        unsafe { self.inner.upload_with(dst, bytes, fill) }
    }

    unsafe fn download(&mut self, src: DevicePtr, bytes: &mut [u8]) -> Result<()> {
        // SAFETY: promised by the caller.
        unsafe { self.inner.download(src, bytes) }
    }

    unsafe fn fill(&mut self, span: Span, byte: u8) -> Result<()> {
        // SAFETY: promised by the caller.
        unsafe { self.inner.fill(span, byte) }
    }

    unsafe fn fill_rows(&mut self, first: Span, pitch_bytes: usize, rows: usize, byte: u8) -> Result<()> {
        // SAFETY: promised by the caller.
        unsafe { self.inner.fill_rows(first, pitch_bytes, rows, byte) }
    }

    unsafe fn launch(&mut self, node: &Node) -> Result<()> {
        self.record.lock().unwrap().work.push(Work::Launch(Box::new(node.clone())));
        // SAFETY: promised by the caller.
        unsafe { self.inner.launch(node) }
    }

    unsafe fn instantiate(&mut self, list: Arc<NodeList>) -> Result<Box<dyn Executable>> {
        // SAFETY: promised by the caller.
        let inner = unsafe { self.inner.instantiate(list.clone()) }?;
        let mut record = self.record.lock().unwrap();
        record.work.push(Work::Instantiate(list));
        record.executables += 1;
        let number = record.executables - 1;
        Ok(Box::new(Numbered { inner, record: self.record.clone(), number }))
    }

    fn replay(&mut self, executable: &dyn Executable) -> Result<()> {
        let Numbered { inner, number, .. } = executable.as_any().downcast_ref().unwrap();
        self.record.lock().unwrap().work.push(Work::Replay(*number));
        self.inner.replay(inner.as_ref())
    }

    fn record(&mut self) -> Result<Box<dyn Event>> {
        self.inner.record()
    }

    fn record_timed(&mut self) -> Result<Box<dyn Event>> {
        self.inner.record_timed()
    }

    fn synchronize(&mut self) -> Result<()> {
        self.inner.synchronize()
    }
}

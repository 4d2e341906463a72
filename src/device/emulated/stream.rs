//! Streams of the emulated device: everything enqueued has run when the call returns.
//!
//! Copies and fills promise more than [`Stream`] asks for. They look their range up in the table of allocations and
//! keep the table locked until they are done: a range outside one live allocation is an error, and no other thread
//! frees the allocation meanwhile, or copies there. Freeing takes the same lock, and no other while it holds it;
//! nothing that a copy calls in between frees or allocates. Launches look their declared spans up too, but run without
//! the lock, or one session would wait for another's kernels: that nobody frees or touches their memory meanwhile, by
//! copies neither, is their callers' promise alone.

use super::audit::Names;
use super::ffi::{self, Kernel, RawSpan};
use super::{ReplayOrder, Shared, audit, build_kind, host_pointer, lock};
use crate::device::{DevicePtr, Event, Executable, Node, NodeList, Span, Stream, check_staging, nvtx};
use crate::error::{Error, Result};
use std::any::Any;
use std::collections::HashMap;
use std::sync::{Arc, MutexGuard};
use std::time::Instant;

pub(super) struct EmulatedStream {
    shared: Arc<Shared>,
    /// Symbols looked up so far.
    kernels: HashMap<&'static str, Kernel>,
    replays: u64,
    /// What [`Stream::upload_with`] hands out. Not the destination itself, which safe code could free or write to
    /// while it fills.
    staging: Vec<u8>,
}

/// Device memory that stays where it is.
struct Held<'a> {
    start: *mut u8,
    _allocations: MutexGuard<'a, Names>,
}

/// The list itself, with its kernels looked up.
struct Replayable {
    shared: Arc<Shared>,
    list: Arc<NodeList>,
    kernels: Vec<Kernel>,
    /// For every dependent node, what the other nodes write.
    foreign: Vec<Vec<RawSpan>>,
}

impl Executable for Replayable {
    unsafe fn set_params(&mut self, index: usize, node: &Node) -> Result<()> {
        self.shared.begin("set_params")?;
        // Whoever recorded the list keeps it as it was.
        Arc::make_mut(&mut self.list).set_params(index, node)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Everything before it has run.
struct Passed {
    at: Instant,
}

impl Event for Passed {
    fn is_done(&self) -> Result<bool> {
        Ok(true)
    }

    fn wait(&self) -> Result<()> {
        Ok(())
    }

    fn milliseconds_since(&self, earlier: &dyn Event) -> Result<f64> {
        let Some(earlier) = earlier.as_any().downcast_ref::<Passed>() else {
            return Err(Error::Device("time since an event of another device".into()));
        };
        Ok(self.at.saturating_duration_since(earlier.at).as_secs_f64() * 1e3)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl EmulatedStream {
    pub(super) fn new(shared: Arc<Shared>) -> EmulatedStream {
        EmulatedStream { shared, kernels: HashMap::new(), replays: 0, staging: Vec::new() }
    }

    fn kernel(&mut self, node: &Node) -> Result<Kernel> {
        let symbol = node.kernel.symbol;
        if let Some(kernel) = self.kernels.get(symbol) {
            return check_params(node, *kernel);
        }
        let kernel = ffi::find(symbol).ok_or_else(|| Error::Launch {
            kernel: symbol.into(),
            reason: format!(
                "no kernel of this name was compiled in; kernels/{}.cu should hold it",
                node.kernel.module
            ),
        })?;
        self.kernels.insert(symbol, kernel);
        check_params(node, kernel)
    }

    fn run(&self, node: &Node, kernel: Kernel, foreign: &[RawSpan]) -> Result<()> {
        self.shared.check()?;
        self.check_spans(node)?;
        let _range = nvtx::range(|| &node.label);
        let build = build_kind();
        let (mut pieces, names) = match build {
            "race" => (lock(&self.shared.names).allocations(), Vec::new()),
            "count" => lock(&self.shared.names).pieces(&node.reads, &node.writes),
            _ => (Vec::new(), Vec::new()),
        };
        let request = ffi::Launch {
            kernel,
            geometry: &node.geometry,
            params: node.params.as_slice(),
            options: &self.shared.options,
            foreign,
            pieces: &mut pieces,
        };
        // SAFETY: promised to `launch`, or to `instantiate` and `set_params`. What a broken promise does is what it
        // would do on a GPU, and the instrumented builds exist to find it.
        let outcome = unsafe { ffi::launch(request) };
        if build == "count" {
            let launch = audit::summarise(&node.label, node.kernel.symbol, &pieces, &names);
            lock(&self.shared.audits).push(launch);
        }
        outcome.map_err(|report| {
            let reason = format!("{} ({}): {report}", node.label, node.kernel.symbol);
            lock(&self.shared.error).get_or_insert_with(|| reason.clone());
            Error::Launch { kernel: node.kernel.symbol.into(), reason }
        })
    }

    /// A node keeps addresses, not buffers: it may have outlived them.
    fn check_spans(&self, node: &Node) -> Result<()> {
        let names = lock(&self.shared.names);
        let mut spans = node.reads.iter().chain(&node.writes);
        match spans.find(|&&span| span.bytes > 0 && !names.holds(span)) {
            None => Ok(()),
            Some(span) => Err(Error::Launch {
                kernel: node.kernel.symbol.into(),
                reason: format!(
                    "{}: declares {} bytes at {:#x}, which are not inside one allocation",
                    node.label, span.bytes, span.ptr.0
                ),
            }),
        }
    }

    /// Where `bytes` bytes of device memory lie on the host; an error unless one allocation holds them all. Nothing is
    /// freed until the answer is dropped.
    fn resolve(&self, ptr: DevicePtr, bytes: usize, what: &str) -> Result<Held<'_>> {
        self.shared.begin(what)?;
        let allocations = lock(&self.shared.names);
        if !allocations.holds(Span { ptr, bytes }) {
            return Err(Error::Device(format!(
                "{what} of {bytes} bytes at {:#x}: not inside one allocation",
                ptr.0
            )));
        }
        Ok(Held { start: host_pointer(ptr), _allocations: allocations })
    }
}

impl Stream for EmulatedStream {
    unsafe fn upload_with(
        &mut self,
        dst: DevicePtr,
        bytes: usize,
        fill: &mut dyn FnMut(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        check_staging(bytes)?;
        self.shared.check()?;
        if self.staging.len() < bytes {
            self.staging.resize(bytes, 0);
        }
        fill(&mut self.staging[..bytes])?;
        let target = self.resolve(dst, bytes, "upload")?;
        // SAFETY: as in `upload`.
        unsafe { target.start.copy_from_nonoverlapping(self.staging.as_ptr(), bytes) };
        Ok(())
    }

    unsafe fn upload(&mut self, dst: DevicePtr, bytes: &[u8]) -> Result<()> {
        let target = self.resolve(dst, bytes.len(), "upload")?;
        // SAFETY: the range lies inside an allocation that lives as long as `target`, and no host slice overlaps it; no
        // kernel is at work there, as the caller promised.
        unsafe { target.start.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        Ok(())
    }

    unsafe fn download(&mut self, src: DevicePtr, bytes: &mut [u8]) -> Result<()> {
        let source = self.resolve(src, bytes.len(), "download")?;
        // SAFETY: as in `upload`.
        unsafe { source.start.copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    unsafe fn fill(&mut self, span: Span, byte: u8) -> Result<()> {
        let target = self.resolve(span.ptr, span.bytes, "fill")?;
        // SAFETY: as in `upload`.
        unsafe { target.start.write_bytes(byte, span.bytes) };
        Ok(())
    }

    unsafe fn launch(&mut self, node: &Node) -> Result<()> {
        self.shared.begin("launch")?;
        let kernel = self.kernel(node)?;
        self.run(node, kernel, &[])
    }

    unsafe fn instantiate(&mut self, list: Arc<NodeList>) -> Result<Box<dyn Executable>> {
        self.shared.begin("instantiate")?;
        let nodes = list.nodes();
        let kernels = nodes.iter().map(|node| self.kernel(node)).collect::<Result<_>>()?;
        let foreign = nodes
            .iter()
            .enumerate()
            .map(
                |(index, node)| {
                    if node.geometry.dependent { foreign_writes(nodes, index) } else { Vec::new() }
                },
            )
            .collect();
        Ok(Box::new(Replayable { shared: self.shared.clone(), list, kernels, foreign }))
    }

    fn replay(&mut self, executable: &dyn Executable) -> Result<()> {
        let ours = |executable: &&Replayable| Arc::ptr_eq(&executable.shared, &self.shared);
        let Some(Replayable { list, kernels, foreign, .. }) = executable.as_any().downcast_ref().filter(ours)
        else {
            return Err(Error::Device("replay of an executable that another device made".into()));
        };
        self.shared.begin("replay")?;
        let order = match self.shared.options.replay_order {
            ReplayOrder::Recorded => (0..list.len()).collect(),
            ReplayOrder::Legal(seed) => list.legal_order(seed.wrapping_add(self.replays)),
        };
        self.replays += 1;
        for index in order {
            self.run(&list.nodes()[index], kernels[index], &foreign[index])?;
        }
        Ok(())
    }

    fn record(&mut self) -> Result<Box<dyn Event>> {
        self.shared.begin("record")?;
        Ok(Box::new(Passed { at: Instant::now() }))
    }

    fn record_timed(&mut self) -> Result<Box<dyn Event>> {
        self.record()
    }

    fn synchronize(&mut self) -> Result<()> {
        self.shared.begin("synchronize")
    }
}

/// A struct of another size is another struct.
fn check_params(node: &Node, kernel: Kernel) -> Result<Kernel> {
    let found = node.params.as_slice().len();
    if found == kernel.params_bytes {
        return Ok(kernel);
    }
    Err(Error::Launch {
        kernel: node.kernel.symbol.into(),
        reason: format!(
            "{}: parameter struct of {found} bytes, the kernel takes {}",
            node.label, kernel.params_bytes
        ),
    })
}

/// What the nodes other than `index` write, sorted and merged.
fn foreign_writes(nodes: &[Node], index: usize) -> Vec<RawSpan> {
    let others = nodes.iter().enumerate().filter(|(other, _)| *other != index);
    let mut spans: Vec<RawSpan> = others
        .flat_map(|(_, node)| &node.writes)
        .filter(|span| span.bytes > 0)
        .map(|&span| span.into())
        .collect();
    spans.sort_by_key(|span| span.start);
    let mut merged: Vec<RawSpan> = Vec::with_capacity(spans.len());
    for span in spans {
        match merged.last_mut() {
            Some(last) if span.start <= last.end => last.end = last.end.max(span.end),
            _ => merged.push(span),
        }
    }
    merged
}

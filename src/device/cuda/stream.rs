//! Streams and events. Nothing here waits for the device but `download`, `synchronize` and an event's `wait`.

use super::graph::{CudaExecutable, attributes};
use super::shared::{Shared, lock};
use super::staging::Lease;
use super::sys::{
    EVENT_DEFAULT, EVENT_DISABLE_TIMING, EventHandle, LaunchConfig, NOT_READY, STREAM_NON_BLOCKING,
    StreamHandle,
};
use super::turns;
use crate::device::{DevicePtr, Event, Executable, Node, NodeList, Span, Stream, check_staging, nvtx};
use crate::error::{Error, Result};
use std::any::Any;
use std::ffi::c_uint;
use std::sync::Arc;

pub(super) struct CudaStream {
    handle: StreamHandle,
    shared: Arc<Shared>,
}

impl CudaStream {
    pub fn new(shared: Arc<Shared>) -> Result<CudaStream> {
        let mut handle = StreamHandle::NULL;
        {
            let _entered = shared.enter()?;
            // Non-blocking: the legacy default stream of the host program must not order us.
            // SAFETY: a place for the answer.
            shared.check(unsafe { shared.driver.cuStreamCreate(&mut handle, STREAM_NON_BLOCKING) })?;
        }
        Ok(CudaStream { handle, shared })
    }

    /// A new event at the end of the queue.
    fn mark(&mut self, flags: c_uint) -> Result<Box<dyn Event>> {
        let shared = &self.shared;
        let _entered = shared.enter()?;
        let mut handle = EventHandle::NULL;
        // SAFETY: a place for the answer.
        shared.check(unsafe { shared.driver.cuEventCreate(&mut handle, flags) })?;
        let event = CudaEvent { handle, shared: shared.clone() };
        // SAFETY: an event and a stream of this context.
        shared.check(unsafe { shared.driver.cuEventRecord(handle, self.handle) })?;
        Ok(Box::new(event))
    }
}

impl Drop for CudaStream {
    fn drop(&mut self) {
        let _entered = self.shared.enter_anyway();
        turns::leave(&self.shared, self.handle);
        // SAFETY: made in `new` and destroyed once; work in it is finished by the driver.
        let _ = unsafe { self.shared.driver.cuStreamDestroy_v2(self.handle) };
    }
}

impl Stream for CudaStream {
    unsafe fn upload_with(
        &mut self,
        dst: DevicePtr,
        bytes: usize,
        fill: &mut dyn FnMut(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        check_staging(bytes)?;
        let shared = &self.shared;
        let mut lease = {
            let _entered = shared.enter()?;
            Lease::take(shared)?
        };
        // Neither the ring's lock nor the context is held meanwhile: the caller's code may need both.
        fill(lease.bytes(bytes))?;
        let _entered = shared.enter()?;
        lease.copy(self.handle, dst.0, bytes)
    }

    unsafe fn download(&mut self, src: DevicePtr, bytes: &mut [u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let shared = &self.shared;
        let _entered = shared.enter()?;
        // SAFETY: `bytes` is pageable memory, into which the driver copies before it returns; the wait below
        // holds whatever it does with other kinds.
        let status = unsafe {
            shared.driver.cuMemcpyDtoHAsync_v2(bytes.as_mut_ptr().cast(), src.0, bytes.len(), self.handle)
        };
        shared.check(status)?;
        // SAFETY: a stream of this context.
        shared.check(unsafe { shared.driver.cuStreamSynchronize(self.handle) })
    }

    unsafe fn fill(&mut self, span: Span, byte: u8) -> Result<()> {
        if span.bytes == 0 {
            return Ok(());
        }
        let shared = &self.shared;
        let _entered = shared.enter()?;
        // SAFETY: the driver checks the range against its allocations.
        let status = unsafe { shared.driver.cuMemsetD8Async(span.ptr.0, byte, span.bytes, self.handle) };
        shared.check(status)
    }

    unsafe fn fill_rows(&mut self, first: Span, pitch_bytes: usize, rows: usize, byte: u8) -> Result<()> {
        if first.bytes == 0 || rows == 0 {
            return Ok(());
        }
        let shared = &self.shared;
        let _entered = shared.enter()?;
        // SAFETY: the driver checks the range against its allocations.
        let status = unsafe {
            shared.driver.cuMemsetD2D8Async(first.ptr.0, pitch_bytes, byte, first.bytes, rows, self.handle)
        };
        shared.check(status)
    }

    unsafe fn launch(&mut self, node: &Node) -> Result<()> {
        let shared = &self.shared;
        let _range = nvtx::range(|| &node.label);
        let _entered = shared.enter()?;
        let function = lock(&shared.modules).function(shared, node)?;
        let geometry = &node.geometry;
        let dependent = geometry.dependent && shared.options.dependent_launch;
        let (mut list, count) = attributes(geometry, dependent);
        let config = LaunchConfig {
            grid: geometry.grid,
            block: geometry.block,
            shared_bytes: geometry.shared_bytes,
            stream: self.handle,
            attributes: list.as_mut_ptr(),
            attribute_count: count,
        };
        let mut arguments = [node.params.as_slice().as_ptr().cast_mut().cast()];
        let _turn = geometry.cooperative.then(|| turns::take(shared, self.handle)).transpose()?;
        // SAFETY: `function` takes one struct of exactly these bytes, which the driver copies before it returns;
        // the attributes outlive the call. What the struct's addresses point to is the caller's promise.
        let status = unsafe {
            shared.driver.cuLaunchKernelEx(&config, function, arguments.as_mut_ptr(), std::ptr::null_mut())
        };
        shared.check_launch(status, node.kernel.symbol)
    }

    unsafe fn instantiate(&mut self, list: Arc<NodeList>) -> Result<Box<dyn Executable>> {
        let _entered = self.shared.enter()?;
        Ok(Box::new(CudaExecutable::new(self.shared.clone(), self.handle, list)?))
    }

    fn replay(&mut self, executable: &dyn Executable) -> Result<()> {
        let shared = &self.shared;
        let executable = executable
            .as_any()
            .downcast_ref::<CudaExecutable>()
            .filter(|executable| {
                Arc::ptr_eq(executable.shared(), shared) && executable.stream() == self.handle
            })
            .ok_or_else(|| Error::Device("replay of an executable that another stream made".into()))?;
        let Some(handle) = executable.handle() else { return Ok(()) };
        let _entered = shared.enter()?;
        let _turn = executable.cooperative().then(|| turns::take(shared, self.handle)).transpose()?;
        // SAFETY: an executable graph and a stream of this context; replays of one graph are ordered by the
        // stream, and what its nodes do was promised to `instantiate` and `set_params`.
        let status = unsafe { shared.driver.cuGraphLaunch(handle, self.handle) };
        shared.check_launch(status, "a graph")
    }

    fn record(&mut self) -> Result<Box<dyn Event>> {
        self.mark(EVENT_DISABLE_TIMING)
    }

    fn record_timed(&mut self) -> Result<Box<dyn Event>> {
        self.mark(EVENT_DEFAULT)
    }

    fn synchronize(&mut self) -> Result<()> {
        let shared = &self.shared;
        let _entered = shared.enter()?;
        // SAFETY: a stream of this context.
        shared.check(unsafe { shared.driver.cuStreamSynchronize(self.handle) })
    }
}

struct CudaEvent {
    handle: EventHandle,
    shared: Arc<Shared>,
}

impl Event for CudaEvent {
    fn is_done(&self) -> Result<bool> {
        let shared = &self.shared;
        let _entered = shared.enter()?;
        // SAFETY: an event of this context.
        let status = unsafe { shared.driver.cuEventQuery(self.handle) };
        match status.code {
            NOT_READY => Ok(false),
            _ => shared.check(status).map(|()| true),
        }
    }

    fn wait(&self) -> Result<()> {
        let shared = &self.shared;
        let _entered = shared.enter()?;
        // SAFETY: an event of this context.
        shared.check(unsafe { shared.driver.cuEventSynchronize(self.handle) })
    }

    fn milliseconds_since(&self, earlier: &dyn Event) -> Result<f64> {
        let shared = &self.shared;
        let earlier = earlier
            .as_any()
            .downcast_ref::<CudaEvent>()
            .filter(|earlier| Arc::ptr_eq(&earlier.shared, shared))
            .ok_or_else(|| Error::Device("time since an event of another device".into()))?;
        let _entered = shared.enter()?;
        let mut milliseconds = 0f32;
        // SAFETY: a place for the answer and two events of this context; the driver refuses those without a time.
        shared.check(unsafe {
            shared.driver.cuEventElapsedTime_v2(&mut milliseconds, earlier.handle, self.handle)
        })?;
        Ok(f64::from(milliseconds))
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Drop for CudaEvent {
    fn drop(&mut self) {
        let _entered = self.shared.enter_anyway();
        // SAFETY: made in `record` and destroyed once.
        let _ = unsafe { self.shared.driver.cuEventDestroy_v2(self.handle) };
    }
}

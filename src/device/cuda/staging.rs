//! The pinned ring that host-to-device copies go through. A copy from pinned memory overlaps with the host
//! filling the next slot; a copy from pageable memory would be staged by the driver, slot by slot, with the host
//! waiting.

use super::shared::Shared;
use super::sys::{Driver, EVENT_DISABLE_TIMING, EventHandle, StreamHandle};
use crate::error::{Error, Result};
use std::ffi::c_void;

/// Bytes of a slot: what the loader converts at a time.
const SLOT_BYTES: usize = 8 << 20;

/// Slots: one being filled, one being copied, one between.
const SLOTS: usize = 3;

/// Pinned slots, allocated when first used and shared by all streams of a device.
#[derive(Default)]
pub(super) struct Ring {
    slots: Vec<Slot>,
    next: usize,
}

struct Slot {
    memory: *mut c_void,
    /// Passed when the last copy out of the slot has ended.
    copied: EventHandle,
}

// SAFETY: pinned memory belongs to no thread, and the ring is only used under its lock.
unsafe impl Send for Slot {}

impl Ring {
    /// Enqueues a copy of `bytes` to `dst`; `bytes` may be reused on return. The context must be current.
    pub fn upload(&mut self, shared: &Shared, stream: StreamHandle, dst: u64, bytes: &[u8]) -> Result<()> {
        let mut dst = dst;
        for chunk in bytes.chunks(SLOT_BYTES) {
            if self.slots.len() < SLOTS {
                let slot = Slot::new(shared)?;
                self.slots.push(slot);
                self.next = self.slots.len() - 1;
            }
            let index = self.next;
            self.next = (index + 1) % SLOTS;
            let slot =
                self.slots.get(index).ok_or_else(|| Error::Internal(format!("no staging slot {index}")))?;
            slot.copy(shared, stream, dst, chunk)?;
            dst += chunk.len() as u64;
        }
        Ok(())
    }

    /// Frees everything; errors change nothing. The context should be current.
    pub fn free(&mut self, driver: &Driver) {
        for slot in self.slots.drain(..) {
            slot.free(driver);
        }
    }
}

impl Slot {
    fn new(shared: &Shared) -> Result<Slot> {
        let mut memory = std::ptr::null_mut();
        // Not write-combined: the host writes whole cache lines anyway, and flags 0 is what every driver allows.
        // SAFETY: a place for the answer.
        let status = unsafe { shared.driver.cuMemHostAlloc(&mut memory, SLOT_BYTES, 0) };
        shared.check_memory(status, "pinned host memory for uploads", SLOT_BYTES)?;
        let mut copied = EventHandle::NULL;
        // SAFETY: a place for the answer.
        let status = unsafe { shared.driver.cuEventCreate(&mut copied, EVENT_DISABLE_TIMING) };
        if let Err(error) = shared.check(status) {
            // SAFETY: allocated above, used by nothing.
            let _ = unsafe { shared.driver.cuMemFreeHost(memory) };
            return Err(error);
        }
        Ok(Slot { memory, copied })
    }

    /// `chunk` must fit the slot.
    fn copy(&self, shared: &Shared, stream: StreamHandle, dst: u64, chunk: &[u8]) -> Result<()> {
        let driver = &shared.driver;
        // An event that was never recorded counts as passed.
        // SAFETY: an event of this context.
        shared.check(unsafe { driver.cuEventSynchronize(self.copied) })?;
        // SAFETY: the slot holds SLOT_BYTES, of which no copy reads any more; `chunk` is no longer than that, and
        // no Rust slice refers to pinned memory.
        unsafe { chunk.as_ptr().copy_to_nonoverlapping(self.memory.cast(), chunk.len()) };
        // SAFETY: the slot is not written again before the event recorded below has passed; `dst` is checked by
        // the driver, which knows its allocations.
        let status = unsafe { driver.cuMemcpyHtoDAsync_v2(dst, self.memory, chunk.len(), stream) };
        shared.check(status)?;
        // SAFETY: an event and a stream of this context.
        let status = unsafe { driver.cuEventRecord(self.copied, stream) };
        shared.check(status).inspect_err(|_| {
            // The event does not guard this copy, so its end is awaited here.
            // SAFETY: a stream of this context.
            let _ = unsafe { driver.cuStreamSynchronize(stream) };
        })
    }

    fn free(self, driver: &Driver) {
        // SAFETY: an event of this context; a stream may have been destroyed while it still copied.
        let _ = unsafe { driver.cuEventSynchronize(self.copied) };
        // SAFETY: made in `new` and destroyed once.
        let _ = unsafe { driver.cuEventDestroy_v2(self.copied) };
        // SAFETY: allocated in `new`, freed once, and the last copy out of it has ended.
        let _ = unsafe { driver.cuMemFreeHost(self.memory) };
    }
}

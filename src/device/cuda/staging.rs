//! The pinned ring that host-to-device copies go through. A copy from pinned memory overlaps with the host
//! filling the next slot; a copy from pageable memory would be staged by the driver, slot by slot, with the host
//! waiting. Whoever uploads writes into a slot itself, so that no byte is moved twice on the host.

use super::shared::{Shared, lock};
use super::sys::{Driver, EVENT_DISABLE_TIMING, EventHandle, StreamHandle};
use crate::device::STAGING_BYTES;
use crate::error::Result;
use std::collections::VecDeque;
use std::ffi::c_void;

/// Slots that are kept: one being filled, one being copied, one between.
const SLOTS: usize = 3;

/// Pinned slots, allocated when first used and shared by all streams of a device.
#[derive(Default)]
pub(super) struct Ring {
    /// The slots that nobody is filling; in front the one whose copy was enqueued first.
    idle: VecDeque<Slot>,
    /// Those and the ones that are leased. More than [`SLOTS`] only while more uploads than that are being filled at
    /// the same time: to wait for one of them could be to wait for oneself.
    slots: usize,
}

/// Pinned memory of [`STAGING_BYTES`].
struct Slot {
    memory: *mut c_void,
    /// Passed when the last copy out of the slot has ended.
    copied: EventHandle,
}

// SAFETY: pinned memory belongs to no thread, and a slot is used by its one owner only: the ring or a lease.
unsafe impl Send for Slot {}

impl Ring {
    /// A slot to fill. The context must be current.
    fn take(&mut self, shared: &Shared) -> Result<Slot> {
        let waiting = if self.slots < SLOTS { None } else { self.idle.pop_front() };
        if let Some(slot) = waiting {
            return Ok(slot);
        }
        let slot = Slot::new(shared)?;
        self.slots += 1;
        Ok(slot)
    }

    /// Takes a slot back, or hands it out to be freed where there are more than are kept.
    fn give_back(&mut self, slot: Slot) -> Option<Slot> {
        if self.slots > SLOTS {
            self.slots -= 1;
            return Some(slot);
        }
        self.idle.push_back(slot);
        None
    }

    /// Frees everything; errors change nothing. The context should be current, and no slot leased.
    pub fn free(&mut self, driver: &Driver) {
        for slot in self.idle.drain(..) {
            slot.free(driver);
        }
        self.slots = 0;
    }
}

/// A slot in the hands of one upload; goes back to the ring whatever happens.
pub(super) struct Lease<'a> {
    shared: &'a Shared,
    /// Until the lease is dropped.
    slot: Option<Slot>,
}

impl<'a> Lease<'a> {
    /// Takes a slot, and waits until the last copy out of it has ended. The context must be current.
    pub fn take(shared: &'a Shared) -> Result<Lease<'a>> {
        let slot = lock(&shared.ring).take(shared)?;
        let copied = slot.copied;
        let lease = Lease { shared, slot: Some(slot) };
        // An event that was never recorded counts as passed.
        // SAFETY: an event of this context.
        shared.check(unsafe { shared.driver.cuEventSynchronize(copied) })?;
        Ok(lease)
    }

    /// The first `bytes` bytes of the slot, at most [`STAGING_BYTES`].
    pub fn bytes(&mut self, bytes: usize) -> &mut [u8] {
        let Some(slot) = &mut self.slot else { return &mut [] };
        // SAFETY: the slot holds as many bytes, all written once when it was made; no copy reads them, since `take`
        // awaited the last one and `copy` ends the lease; and the lease owns the slot alone.
        let all = unsafe { std::slice::from_raw_parts_mut(slot.memory.cast::<u8>(), STAGING_BYTES) };
        &mut all[..bytes.min(STAGING_BYTES)]
    }

    /// Enqueues a copy of the first `bytes` bytes to `dst`. The context must be current.
    pub fn copy(self, stream: StreamHandle, dst: u64, bytes: usize) -> Result<()> {
        let Some(slot) = &self.slot else { return Ok(()) };
        let driver = &self.shared.driver;
        // SAFETY: the slot holds STAGING_BYTES and is not written again before the event recorded below has passed;
        // `dst` is checked by the driver, which knows its allocations.
        let status =
            unsafe { driver.cuMemcpyHtoDAsync_v2(dst, slot.memory, bytes.min(STAGING_BYTES), stream) };
        self.shared.check(status)?;
        // SAFETY: an event and a stream of this context.
        let status = unsafe { driver.cuEventRecord(slot.copied, stream) };
        self.shared.check(status).inspect_err(|_| {
            // The event does not guard this copy, so its end is awaited here.
            // SAFETY: a stream of this context.
            let _ = unsafe { driver.cuStreamSynchronize(stream) };
        })
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        let Some(slot) = self.slot.take() else { return };
        let surplus = lock(&self.shared.ring).give_back(slot);
        if let Some(slot) = surplus {
            let _entered = self.shared.enter_anyway();
            slot.free(&self.shared.driver);
        }
    }
}

impl Slot {
    fn new(shared: &Shared) -> Result<Slot> {
        let mut memory = std::ptr::null_mut();
        // Not write-combined: the host writes whole cache lines anyway, and flags 0 is what every driver allows.
        // SAFETY: a place for the answer.
        let status = unsafe { shared.driver.cuMemHostAlloc(&mut memory, STAGING_BYTES, 0) };
        shared.check_memory(status, "pinned host memory for uploads", STAGING_BYTES)?;
        // Rust lends out no memory that was never written.
        // SAFETY: just allocated with this size.
        unsafe { memory.cast::<u8>().write_bytes(0, STAGING_BYTES) };
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

    fn free(self, driver: &Driver) {
        // SAFETY: an event of this context; a stream may have been destroyed while it still copied.
        let _ = unsafe { driver.cuEventSynchronize(self.copied) };
        // SAFETY: made in `new` and destroyed once.
        let _ = unsafe { driver.cuEventDestroy_v2(self.copied) };
        // SAFETY: allocated in `new`, freed once, and the last copy out of it has ended.
        let _ = unsafe { driver.cuMemFreeHost(self.memory) };
    }
}

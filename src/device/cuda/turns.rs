//! Cooperative kernels of different streams, one after another.
//!
//! Their blocks wait for each other and so must all be on the GPU at once. The driver sees to that for one launch; of
//! two at the same time, each with some of its blocks on the SMs, CUDA's documents say nothing, and neither would end.
//! So a stream that is about to launch one waits, on the device, for what another stream has enqueued up to then. One
//! stream alone pays nothing for it.

use super::shared::{Shared, lock};
use super::sys::{EVENT_DISABLE_TIMING, EventHandle, StreamHandle};
use crate::error::Result;
use std::sync::MutexGuard;

/// Whose cooperative launch was the last.
#[derive(Default)]
pub(super) struct Turns {
    last: Last,
    /// Made when a second stream takes a turn.
    event: Option<EventHandle>,
}

#[derive(Clone, Copy, Default, PartialEq)]
enum Last {
    /// Nobody's.
    #[default]
    None,
    /// A stream's that is alive.
    Of(StreamHandle),
    /// A stream's that is gone: the event stands for it.
    Marked,
}

/// Gives `stream` its turn, which lasts while the guard does: the launch belongs there. The context must be current.
pub(super) fn take(shared: &Shared, stream: StreamHandle) -> Result<MutexGuard<'_, Turns>> {
    let mut turns = lock(&shared.turns);
    if turns.last != Last::None && turns.last != Last::Of(stream) {
        let event = turns.mark(shared)?;
        // SAFETY: a stream and an event of this context.
        shared.check(unsafe { shared.driver.cuStreamWaitEvent(stream, event, 0) })?;
    }
    turns.last = Last::Of(stream);
    Ok(turns)
}

/// `stream` is about to be destroyed; what it has enqueued may still run. The context must be current.
pub(super) fn leave(shared: &Shared, stream: StreamHandle) {
    let mut turns = lock(&shared.turns);
    if turns.last == Last::Of(stream) {
        // Where there is no event to be had, the stream's work must be over.
        if turns.mark(shared).is_err() {
            // SAFETY: a stream of this context.
            let _ = unsafe { shared.driver.cuStreamSynchronize(stream) };
            turns.last = Last::None;
        }
    }
}

impl Turns {
    /// The event, behind everything that the last stream has enqueued.
    fn mark(&mut self, shared: &Shared) -> Result<EventHandle> {
        let event = match self.event {
            Some(event) => event,
            None => {
                let mut event = EventHandle::NULL;
                // SAFETY: a place for the answer.
                shared.check(unsafe { shared.driver.cuEventCreate(&mut event, EVENT_DISABLE_TIMING) })?;
                *self.event.insert(event)
            }
        };
        if let Last::Of(stream) = self.last {
            // SAFETY: an event of this context and a stream that is alive: it calls `leave` before it goes.
            shared.check(unsafe { shared.driver.cuEventRecord(event, stream) })?;
            self.last = Last::Marked;
        }
        Ok(event)
    }

    /// Called once, with the context current, when no stream is left.
    pub fn free(&mut self, shared: &Shared) {
        if let Some(event) = self.event.take() {
            // SAFETY: made in `mark` and destroyed once.
            let _ = unsafe { shared.driver.cuEventDestroy_v2(event) };
        }
    }
}

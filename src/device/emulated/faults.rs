//! What tests make fail on purpose, and how much memory is in use.

use crate::error::{Error, Result};

/// A request to an [`EmulatedDevice`](super::EmulatedDevice) that fails on purpose, once. Counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The n-th allocation is out of memory.
    Allocation(u64),
    /// The n-th other call fails: making a stream or an executable, a copy, a fill, a launch, a replay, a record or
    /// a synchronisation.
    Call(u64),
}

#[derive(Default)]
pub(super) struct Faults {
    armed: Option<Fault>,
    calls: u64,
    allocations: u64,
    pub planned_bytes: Option<u64>,
    pub live_bytes: u64,
    pub peak_bytes: u64,
}

impl Faults {
    pub fn armed(fault: Option<Fault>) -> Faults {
        Faults { armed: fault, ..Faults::default() }
    }

    pub fn arm(&mut self, fault: Option<Fault>) {
        (self.armed, self.calls, self.allocations) = (fault, 0, 0);
    }

    /// Calls and allocations since the last `arm`.
    pub fn requests(&self) -> (u64, u64) {
        (self.calls, self.allocations)
    }

    pub fn call(&mut self, call: &str) -> Result<()> {
        self.calls += 1;
        match self.armed {
            Some(Fault::Call(n)) if n == self.calls => {
                Err(Error::Device(format!("{call} failed on purpose (call {n})")))
            }
            _ => Ok(()),
        }
    }

    pub fn allocation(&mut self, bytes: usize, label: &str) -> Result<()> {
        self.allocations += 1;
        if self.armed == Some(Fault::Allocation(self.allocations)) {
            return Err(Error::OutOfMemory {
                what: format!("emulated buffer {label}, on purpose"),
                requested_bytes: bytes as u64,
                free_bytes: 0,
            });
        }
        let total = self.live_bytes.saturating_add(bytes as u64);
        match self.planned_bytes {
            Some(planned) if total > planned => Err(Error::Internal(format!(
                "buffer {label} of {bytes} bytes takes the device to {total}, the plan to {planned}"
            ))),
            _ => Ok(()),
        }
    }

    pub fn allocated(&mut self, bytes: usize) {
        self.live_bytes += bytes as u64;
        self.peak_bytes = self.peak_bytes.max(self.live_bytes);
    }

    pub fn freed(&mut self, bytes: usize) {
        self.live_bytes = self.live_bytes.saturating_sub(bytes as u64);
    }
}

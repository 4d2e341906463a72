//! Names of device memory, and what the `count` build counts per name.
//!
//! Memory is cut into disjoint pieces at every boundary of an allocation, a named span and a declared span, so
//! that the emulator's counters need one look-up per access; the pieces of one name are summed up afterwards.

use super::ffi::Piece;
use crate::device::{DevicePtr, Span};
use std::collections::BTreeMap;

/// Bytes that one launch moved between global memory and the chip, by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaunchAudit {
    /// The node's label.
    pub label: String,
    /// The kernel's symbol.
    pub symbol: String,
    /// Every buffer that was touched, by address.
    pub buffers: Vec<BufferTraffic>,
    /// Accesses to known memory that the node does not declare.
    pub undeclared: Vec<Undeclared>,
}

/// What a launch read and wrote of one named span.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BufferTraffic {
    /// Label of the allocation, or of the smallest named span in it that holds the bytes.
    pub name: String,
    /// Bytes loaded; a byte loaded twice counts twice.
    pub read_bytes: u64,
    /// Different bytes loaded.
    pub read_unique_bytes: u64,
    /// Bytes stored, atomics included.
    pub written_bytes: u64,
    /// Different bytes stored.
    pub written_unique_bytes: u64,
}

/// Bytes that a launch touched outside its node's `reads` and `writes`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Undeclared {
    /// Name of the memory.
    pub name: String,
    /// Where in it the piece begins that was touched, in bytes from the start of its allocation.
    pub offset: u64,
    /// Bytes accessed there.
    pub bytes: u64,
}

/// Live allocations and the names of parts of them.
#[derive(Default)]
pub(super) struct Names {
    /// By start address.
    allocations: BTreeMap<u64, Allocation>,
}

struct Allocation {
    bytes: u64,
    label: String,
    /// Named parts, the latest last.
    parts: Vec<(Span, String)>,
}

/// What a piece belongs to.
#[derive(Clone, Debug)]
pub(super) struct PieceName {
    name: String,
    /// Of the piece in its allocation.
    offset: u64,
}

impl Names {
    pub(super) fn add_allocation(&mut self, span: Span, label: &str) {
        let allocation = Allocation { bytes: span.bytes as u64, label: label.into(), parts: Vec::new() };
        self.allocations.insert(span.ptr.0, allocation);
    }

    pub(super) fn remove_allocation(&mut self, ptr: DevicePtr) {
        self.allocations.remove(&ptr.0);
    }

    /// Names a part; a new name for the same part replaces the old one. Spans outside all allocations are ignored.
    pub(super) fn name(&mut self, span: Span, label: &str) {
        if let Some((_, allocation)) = self.holder_mut(span) {
            allocation.parts.retain(|(part, _)| *part != span);
            allocation.parts.push((span, label.into()));
        }
    }

    fn holder_mut(&mut self, span: Span) -> Option<(u64, &mut Allocation)> {
        let (&start, allocation) = self.allocations.range_mut(..=span.ptr.0).next_back()?;
        let end = span.ptr.0.checked_add(span.bytes as u64)?;
        (end <= start + allocation.bytes).then_some((start, allocation))
    }

    /// Whether one allocation holds all of `span`.
    pub(super) fn holds(&self, span: Span) -> bool {
        let Some((&start, allocation)) = self.allocations.range(..=span.ptr.0).next_back() else {
            return false;
        };
        span.ptr.0.checked_add(span.bytes as u64).is_some_and(|end| end <= start + allocation.bytes)
    }

    /// All allocations, sorted.
    pub(super) fn allocations(&self) -> Vec<Piece> {
        let piece =
            |(&start, a): (&u64, &Allocation)| Piece { start, end: start + a.bytes, ..Piece::default() };
        self.allocations.iter().map(piece).collect()
    }

    /// All memory as sorted, disjoint pieces for a launch that declares `reads` and `writes`, and their names.
    pub(super) fn pieces(&self, reads: &[Span], writes: &[Span]) -> (Vec<Piece>, Vec<PieceName>) {
        let (mut pieces, mut names) = (Vec::new(), Vec::new());
        for (&start, allocation) in &self.allocations {
            let whole = Span { ptr: DevicePtr(start), bytes: allocation.bytes as usize };
            let parts: Vec<&(Span, String)> = allocation.parts.iter().collect();
            let read: Vec<&Span> = reads.iter().filter(|span| span.overlaps(&whole)).collect();
            let written: Vec<&Span> = writes.iter().filter(|span| span.overlaps(&whole)).collect();
            let end = start + allocation.bytes;
            let mut cuts = vec![start, end];
            for span in
                parts.iter().map(|(span, _)| span).chain(read.iter().copied()).chain(written.iter().copied())
            {
                cuts.extend([span.ptr.0, span.ptr.0 + span.bytes as u64].map(|cut| cut.clamp(start, end)));
            }
            cuts.sort_unstable();
            cuts.dedup();
            for (&from, &to) in cuts.iter().zip(cuts.iter().skip(1)) {
                let piece = Span { ptr: DevicePtr(from), bytes: (to - from) as usize };
                let declared = |spans: &[&Span]| spans.iter().any(|span| span.overlaps(&piece));
                pieces.push(Piece {
                    start: from,
                    end: to,
                    may_read: declared(&read).into(),
                    may_write: declared(&written).into(),
                    ..Piece::default()
                });
                // The smallest part wins, and of equal ones the latest.
                let part = parts
                    .iter()
                    .rev()
                    .filter(|(span, _)| span.overlaps(&piece))
                    .min_by_key(|(span, _)| span.bytes);
                let name = part.map_or(&allocation.label, |(_, label)| label).clone();
                names.push(PieceName { name, offset: from - start });
            }
        }
        (pieces, names)
    }
}

/// Sums the counters of pieces by name.
pub(super) fn summarise(label: &str, symbol: &str, pieces: &[Piece], names: &[PieceName]) -> LaunchAudit {
    let mut audit = LaunchAudit {
        label: label.into(),
        symbol: symbol.into(),
        buffers: Vec::new(),
        undeclared: Vec::new(),
    };
    for (piece, PieceName { name, offset }) in pieces.iter().zip(names) {
        if piece.read_bytes == 0 && piece.written_bytes == 0 {
            continue;
        }
        if piece.undeclared_bytes > 0 {
            audit.undeclared.push(Undeclared {
                name: name.clone(),
                offset: *offset,
                bytes: piece.undeclared_bytes,
            });
        }
        let index = audit.buffers.iter().position(|buffer| buffer.name == *name).unwrap_or_else(|| {
            audit.buffers.push(BufferTraffic { name: name.clone(), ..BufferTraffic::default() });
            audit.buffers.len() - 1
        });
        let buffer = &mut audit.buffers[index];
        buffer.read_bytes += piece.read_bytes;
        buffer.read_unique_bytes += piece.read_unique_bytes;
        buffer.written_bytes += piece.written_bytes;
        buffer.written_unique_bytes += piece.written_unique_bytes;
    }
    audit
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(start: u64, bytes: usize) -> Span {
        Span { ptr: DevicePtr(start), bytes }
    }

    #[test]
    fn memory_is_cut_at_names_and_declarations_and_the_innermost_name_wins() {
        let mut names = Names::default();
        names.add_allocation(span(1000, 100), "arena");
        names.name(span(1010, 50), "outer");
        names.name(span(1020, 10), "inner");
        names.name(span(900, 10), "nowhere");
        let (pieces, labels) = names.pieces(&[span(1000, 25)], &[span(1090, 10)]);
        let table: Vec<_> = pieces
            .iter()
            .zip(&labels)
            .map(|(p, n)| (p.start, p.end, n.name.as_str(), p.may_read, p.may_write))
            .collect();
        assert_eq!(
            table,
            [
                (1000, 1010, "arena", 1, 0),
                (1010, 1020, "outer", 1, 0),
                (1020, 1025, "inner", 1, 0),
                (1025, 1030, "inner", 0, 0),
                (1030, 1060, "outer", 0, 0),
                (1060, 1090, "arena", 0, 0),
                (1090, 1100, "arena", 0, 1),
            ]
        );
    }

    #[test]
    fn an_empty_or_freed_allocation_holds_nothing() {
        let mut names = Names::default();
        names.add_allocation(span(1000, 100), "a");
        assert!(names.holds(span(1000, 100)) && names.holds(span(1100, 0)));
        assert!(
            !names.holds(span(1000, 101)) && !names.holds(span(999, 2)) && !names.holds(span(u64::MAX, 2))
        );
        names.remove_allocation(DevicePtr(1000));
        assert!(!names.holds(span(1000, 1)));
    }
}

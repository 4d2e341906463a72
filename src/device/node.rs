//! Nodes and node lists: what will be launched, with which bytes, after what.

use super::DevicePtr;
use crate::error::{Error, Result};

/// Largest parameter struct, in bytes (CUDA allows 4096 for `__grid_constant__`; ours stay far below).
pub const MAX_PARAMS_BYTES: usize = 512;

/// A range of device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First byte.
    pub ptr: DevicePtr,
    /// Length in bytes.
    pub bytes: usize,
}

impl Span {
    /// Whether the two share a byte.
    pub fn overlaps(&self, other: &Span) -> bool {
        self.bytes != 0
            && other.bytes != 0
            && self.ptr.0 < other.ptr.0 + other.bytes as u64
            && other.ptr.0 < self.ptr.0 + self.bytes as u64
    }

    /// Whether all of `other` lies in it.
    pub fn contains(&self, other: &Span) -> bool {
        let offset = other.ptr.0.checked_sub(self.ptr.0).and_then(|offset| usize::try_from(offset).ok());
        offset.and_then(|offset| offset.checked_add(other.bytes)).is_some_and(|end| end <= self.bytes)
    }

    /// `bytes` bytes from `offset` on. Panics in debug builds if that leaves the span.
    pub fn slice(&self, offset: usize, bytes: usize) -> Span {
        debug_assert!(offset + bytes <= self.bytes, "slice {offset}+{bytes} of a span of {}", self.bytes);
        Span { ptr: self.ptr.offset(offset), bytes }
    }
}

/// Which kernel: the `.cu` file (= cubin) and the `extern "C"` name in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KernelId {
    /// Stem of the `.cu` file.
    pub module: &'static str,
    /// Symbol of the kernel.
    pub symbol: &'static str,
}

/// Launch geometry and attributes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Blocks per axis.
    pub grid: [u32; 3],
    /// Threads per axis of a block.
    pub block: [u32; 3],
    /// Blocks per cluster per axis; `[1, 1, 1]` for none.
    pub cluster: [u32; 3],
    /// Dynamic shared memory per block in bytes.
    pub shared_bytes: u32,
    /// All blocks are resident together and may use `grid_sync`.
    pub cooperative: bool,
    /// Programmatic dependent launch: may start before its predecessors end; the kernel calls `griddep_wait`
    /// before touching what they write.
    pub dependent: bool,
}

impl Geometry {
    /// A one-dimensional launch with no attributes.
    pub fn linear(blocks: u32, threads: u32) -> Geometry {
        Geometry {
            grid: [blocks, 1, 1],
            block: [threads, 1, 1],
            cluster: [1, 1, 1],
            shared_bytes: 0,
            cooperative: false,
            dependent: false,
        }
    }

    /// The same with `bytes` of dynamic shared memory.
    pub fn with_shared(mut self, bytes: u32) -> Geometry {
        self.shared_bytes = bytes;
        self
    }
}

/// The bytes of a kernel's parameter struct, 16-byte aligned.
#[derive(Clone, Copy)]
#[repr(C, align(16))]
pub struct ParamBytes {
    bytes: [u8; MAX_PARAMS_BYTES],
    len: usize,
}

impl ParamBytes {
    /// Copies a POD parameter struct.
    pub fn of<P: bytemuck::Pod>(params: &P) -> ParamBytes {
        const { assert!(size_of::<P>() <= MAX_PARAMS_BYTES) };
        let mut bytes = [0; MAX_PARAMS_BYTES];
        bytes[..size_of::<P>()].copy_from_slice(bytemuck::bytes_of(params));
        ParamBytes { bytes, len: size_of::<P>() }
    }

    /// The struct's bytes.
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// One launch.
#[derive(Clone)]
pub struct Node {
    /// Where in the model this is, e.g. `decode.layer3.qkv`; names profiles, taps and reports.
    pub label: String,
    /// What runs.
    pub kernel: KernelId,
    /// How it is launched.
    pub geometry: Geometry,
    /// What it is given.
    pub params: ParamBytes,
    /// Every byte range the kernel may read; weights may be left out of neither list.
    pub reads: Vec<Span>,
    /// Every byte range the kernel may write.
    pub writes: Vec<Span>,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({}, grid {:?})", self.label, self.kernel.symbol, self.geometry.grid)
    }
}

impl Node {
    /// Refuses a node that is more than `self` with other parameters.
    pub fn check_same_launch(&self, other: &Node) -> Result<()> {
        let same = self.kernel == other.kernel
            && self.geometry == other.geometry
            && self.params.len == other.params.len
            && self.reads == other.reads
            && self.writes == other.writes;
        match same {
            true => Ok(()),
            false => {
                Err(Error::Internal(format!("{self:?} cannot become {other:?}: only parameters may change")))
            }
        }
    }

    /// Whether `self` and a later `other` may not be swapped: one writes what the other reads or writes.
    pub fn conflicts(&self, other: &Node) -> bool {
        let hit = |a: &[Span], b: &[Span]| a.iter().any(|x| b.iter().any(|y| x.overlaps(y)));
        hit(&self.writes, &other.reads) || hit(&self.writes, &other.writes) || hit(&self.reads, &other.writes)
    }
}

/// Nodes in one legal order, with the edges that every legal order keeps.
#[derive(Clone, Debug, Default)]
pub struct NodeList {
    nodes: Vec<Node>,
    /// `deps[i]`: earlier nodes that must have finished before node `i`, transitively reduced.
    deps: Vec<Vec<usize>>,
    /// `reach[i]`: bit `j` set when node `j` is an ancestor of node `i`.
    reach: Vec<Vec<u64>>,
}

impl NodeList {
    /// An empty list.
    pub fn new() -> NodeList {
        NodeList::default()
    }

    /// Appends a node and derives its dependencies from the declared spans.
    pub fn push(&mut self, node: Node) -> usize {
        let index = self.nodes.len();
        let mut reach = vec![0u64; index / 64 + 1];
        let mut deps = Vec::new();
        // Newest first: an edge that is already implied by a nearer ancestor is not recorded again.
        for j in (0..index).rev() {
            if reach[j / 64] >> (j % 64) & 1 == 0 && self.nodes[j].conflicts(&node) {
                deps.push(j);
                reach[j / 64] |= 1 << (j % 64);
                for (mine, theirs) in reach.iter_mut().zip(&self.reach[j]) {
                    *mine |= theirs;
                }
            }
        }
        self.nodes.push(node);
        self.deps.push(deps);
        self.reach.push(reach);
        index
    }

    /// All nodes, in recording order.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Gives node `index` the parameters of `node`, from which it may differ in nothing else but its label.
    pub fn set_params(&mut self, index: usize, node: &Node) -> Result<()> {
        let count = self.nodes.len();
        let mine = self
            .nodes
            .get_mut(index)
            .ok_or_else(|| Error::Internal(format!("parameters for node {index} of {count}")))?;
        mine.check_same_launch(node)?;
        mine.params = node.params;
        Ok(())
    }

    /// Symbol of the kernel that writes `span` last, or `host` if no node does: names sources in reports.
    pub fn writer(&self, span: Span) -> &'static str {
        let writes = |node: &&Node| node.writes.iter().any(|w| w.overlaps(&span));
        self.nodes.iter().rev().find(writes).map_or("host", |node| node.kernel.symbol)
    }

    /// Direct predecessors of node `index`.
    pub fn deps(&self, index: usize) -> &[usize] {
        &self.deps[index]
    }

    /// Number of nodes.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether there is nothing to run.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Drops the edge `from` → `to`, for tests that prove a missing edge is noticed.
    pub fn remove_edge(&mut self, from: usize, to: usize) -> Result<()> {
        let deps = self
            .deps
            .get_mut(to)
            .ok_or_else(|| Error::Internal(format!("node {to} of {}", self.nodes.len())))?;
        let at = deps
            .iter()
            .position(|&d| d == from)
            .ok_or_else(|| Error::Internal(format!("no edge {from} -> {to}")))?;
        deps.remove(at);
        Ok(())
    }

    /// A random order that keeps every edge; the same `seed` gives the same order.
    pub fn legal_order(&self, seed: u64) -> Vec<usize> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = move |bound: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 16) as usize % bound
        };
        let mut missing: Vec<usize> = self.deps.iter().map(Vec::len).collect();
        let mut successors = vec![Vec::new(); self.len()];
        for (to, deps) in self.deps.iter().enumerate() {
            for &from in deps {
                successors[from].push(to);
            }
        }
        let mut ready: Vec<usize> = (0..self.len()).filter(|&i| missing[i] == 0).collect();
        let mut order = Vec::with_capacity(self.len());
        while !ready.is_empty() {
            let node = ready.swap_remove(next(ready.len()));
            order.push(node);
            for &to in &successors[node] {
                missing[to] -= 1;
                if missing[to] == 0 {
                    ready.push(to);
                }
            }
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(label: &str, reads: &[(u64, usize)], writes: &[(u64, usize)]) -> Node {
        let spans = |list: &[(u64, usize)]| {
            list.iter().map(|&(p, bytes)| Span { ptr: DevicePtr(p), bytes }).collect::<Vec<_>>()
        };
        Node {
            label: label.into(),
            kernel: KernelId { module: "m", symbol: "s" },
            geometry: Geometry::linear(1, 32),
            params: ParamBytes::of(&0u64),
            reads: spans(reads),
            writes: spans(writes),
        }
    }

    #[test]
    fn edges_follow_from_spans_and_are_reduced() {
        let mut list = NodeList::new();
        list.push(node("a", &[], &[(0, 8)]));
        list.push(node("b", &[(0, 8)], &[(8, 8)]));
        list.push(node("c", &[(4, 1)], &[(16, 8)]));
        list.push(node("d", &[(8, 16)], &[(0, 4)]));
        assert_eq!(list.deps(1), [0]);
        assert_eq!(list.deps(2), [0]);
        // d also overwrites what a wrote, but that edge is implied through b and c.
        assert_eq!(list.deps(3), [2, 1]);
    }

    #[test]
    fn only_parameters_change() {
        let mut list = NodeList::new();
        list.push(node("a", &[(0, 8)], &[(8, 8)]));
        let mut other = node("b", &[(0, 8)], &[(8, 8)]);
        other.params = ParamBytes::of(&7u64);
        list.set_params(0, &other).unwrap();
        assert_eq!(list.nodes()[0].params.as_slice(), 7u64.to_ne_bytes());
        assert_eq!(list.nodes()[0].label, "a");
        assert!(list.set_params(1, &other).is_err(), "there is no such node");
        let wider = Node { geometry: Geometry::linear(2, 32), ..other.clone() };
        let longer = Node { params: ParamBytes::of(&[7u64; 2]), ..other.clone() };
        for wrong in [wider, longer, node("c", &[(0, 8)], &[(16, 8)]), node("d", &[], &[(8, 8)])] {
            assert!(matches!(list.set_params(0, &wrong), Err(Error::Internal(_))), "{wrong:?}");
        }
    }

    #[test]
    fn legal_orders_differ_and_keep_edges() {
        let mut list = NodeList::new();
        for i in 0..6 {
            list.push(node("w", &[], &[(i * 8, 8)]));
        }
        list.push(node("all", &[(0, 48)], &[]));
        let orders: std::collections::HashSet<_> = (0..20).map(|s| list.legal_order(s)).collect();
        assert!(orders.len() > 1);
        assert!(orders.iter().all(|o| o.len() == 7 && o[6] == 6));
        list.remove_edge(3, 6).unwrap();
        assert!((0..50).any(|s| list.legal_order(s)[6] != 6));
        assert!(list.remove_edge(3, 6).is_err());
    }
}

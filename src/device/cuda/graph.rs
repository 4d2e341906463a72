//! Node lists as CUDA graphs: one kernel node per node, with exactly the list's edges.
//!
//! An edge into a dependent node is programmatic: the later kernel may start once every block of the earlier one
//! has triggered or ended, and `griddep_wait` in it waits for the end and for the memory. Edges that the list left
//! out because others imply them stay implied: a kernel ends only after its own wait, so that what waits for it
//! waits for its predecessors too. All other edges are full ones, and so are those out of a cooperative kernel: it
//! triggers nothing before its end, and nothing says that a driver takes the two together.

use super::shared::{Shared, lock};
use super::sys::{
    Context, EdgeData, Graph, GraphExec, GraphNode, INSTANTIATE_UPLOAD, InstantiateParams, KernelNodeParams,
    LAUNCH_CLUSTER_DIMENSION, LAUNCH_COOPERATIVE, LAUNCH_PROGRAMMATIC_SERIALIZATION, LaunchAttribute,
    StreamHandle,
};
use crate::device::{Executable, Geometry, Node, NodeList, nvtx};
use crate::error::{Error, Result};
use std::any::Any;
use std::sync::Arc;

/// Launch attributes of `geometry` and their number; `dependent` is only for launches into streams, where it stands
/// for what an edge says in a graph.
pub(super) fn attributes(geometry: &Geometry, dependent: bool) -> ([LaunchAttribute; 3], u32) {
    let mut list = [LaunchAttribute::default(); 3];
    let wanted = [
        (geometry.cluster != [1, 1, 1], LAUNCH_CLUSTER_DIMENSION, geometry.cluster),
        (geometry.cooperative, LAUNCH_COOPERATIVE, [1, 0, 0]),
        (dependent, LAUNCH_PROGRAMMATIC_SERIALIZATION, [1, 0, 0]),
    ];
    let chosen = wanted.into_iter().filter(|(wanted, ..)| *wanted);
    let mut count = 0;
    for (attribute, (_, id, value)) in list.iter_mut().zip(chosen) {
        attribute.id = id;
        attribute.value.0[..3].copy_from_slice(&value);
        count += 1;
    }
    (list, count)
}

/// An executable graph, bound to the stream that made it.
pub(super) struct CudaExecutable {
    /// None for an empty list, of which the driver would make a graph that does nothing.
    exec: Option<Exec>,
    list: Arc<NodeList>,
    cooperative: bool,
    stream: StreamHandle,
    shared: Arc<Shared>,
}

struct Exec {
    handle: GraphExec,
    /// What it was made of: its nodes are the names of the executable's, as long as they live.
    template: Template,
}

/// A graph of kernel nodes. Dropped where the context is current.
struct Template {
    graph: Graph,
    /// In the order of the list.
    nodes: Vec<GraphNode>,
    shared: Arc<Shared>,
}

impl Drop for Template {
    fn drop(&mut self) {
        // SAFETY: made in `CudaExecutable::new` and destroyed once, with its nodes.
        let _ = unsafe { self.shared.driver.cuGraphDestroy(self.graph) };
    }
}

impl CudaExecutable {
    /// Builds, instantiates and uploads the graph. The context must be current.
    pub fn new(shared: Arc<Shared>, stream: StreamHandle, list: Arc<NodeList>) -> Result<CudaExecutable> {
        if list.is_empty() {
            return Ok(CudaExecutable { exec: None, list, cooperative: false, stream, shared });
        }
        let driver = &shared.driver;
        let mut graph = Graph::NULL;
        // SAFETY: a place for the answer.
        shared.check(unsafe { driver.cuGraphCreate(&mut graph, 0) })?;
        let nodes = Vec::with_capacity(list.len());
        let mut template = Template { graph, nodes, shared: shared.clone() };
        for (index, node) in list.nodes().iter().enumerate() {
            let dependent = node.geometry.dependent && shared.options.dependent_launch;
            let before = list.deps(index).iter().map(|&dep| {
                let (made, earlier) = template
                    .nodes
                    .get(dep)
                    .zip(list.nodes().get(dep))
                    .ok_or_else(|| Error::Internal(format!("{node:?} depends on a later node")))?;
                Ok(match dependent && !earlier.geometry.cooperative {
                    true => (*made, EdgeData::PROGRAMMATIC),
                    false => (*made, EdgeData::FULL),
                })
            });
            let (before, edges): (Vec<_>, Vec<_>) = before.collect::<Result<Vec<_>>>()?.into_iter().unzip();
            let made = template.add(node, &before, &edges)?;
            template.nodes.push(made);
        }
        let mut params = InstantiateParams {
            flags: INSTANTIATE_UPLOAD,
            upload_stream: stream,
            error_node: GraphNode::NULL,
            result: 0,
        };
        let mut handle = GraphExec::NULL;
        // SAFETY: a graph of this context, and places for the answers.
        let status = unsafe { driver.cuGraphInstantiateWithParams(&mut handle, graph, &mut params) };
        let culprit = template.nodes.iter().position(|&node| node == params.error_node);
        let culprit = culprit.and_then(|index| list.nodes().get(index));
        let name = culprit.map_or_else(|| "a graph".into(), |node| format!("{node:?}"));
        shared.check_launch(status, &name)?;
        let cooperative = list.nodes().iter().any(|node| node.geometry.cooperative);
        Ok(CudaExecutable { exec: Some(Exec { handle, template }), list, cooperative, stream, shared })
    }

    pub fn handle(&self) -> Option<GraphExec> {
        self.exec.as_ref().map(|exec| exec.handle)
    }

    pub fn stream(&self) -> StreamHandle {
        self.stream
    }

    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Whether blocks of a kernel in it wait for each other.
    pub fn cooperative(&self) -> bool {
        self.cooperative
    }
}

/// Calls `use_params` with what the driver wants to know of `node`, which it copies before it returns.
fn with_params<T>(
    shared: &Shared,
    node: &Node,
    use_params: impl FnOnce(&mut KernelNodeParams) -> T,
) -> Result<T> {
    let geometry = &node.geometry;
    let function = lock(&shared.modules).function(shared, node)?;
    let mut arguments = [node.params.as_slice().as_ptr().cast_mut().cast()];
    Ok(use_params(&mut KernelNodeParams {
        kind: 0,
        reserved0: [0; 3],
        function,
        grid: geometry.grid,
        block: geometry.block,
        shared_bytes: geometry.shared_bytes,
        arguments: arguments.as_mut_ptr(),
        extra: std::ptr::null_mut(),
        kernel: std::ptr::null_mut(),
        context: Context::NULL,
        rest: [0; 20],
        reserved2: 0,
    }))
}

impl Template {
    /// Adds `node` after the nodes `before`, by as many `edges`.
    fn add(&self, node: &Node, before: &[GraphNode], edges: &[EdgeData]) -> Result<GraphNode> {
        let shared = &self.shared;
        let _range = nvtx::range(|| &node.label);
        let geometry = &node.geometry;
        let mut handle = GraphNode::NULL;
        // SAFETY: `function` takes one struct of exactly these bytes, which the driver copies before it returns;
        // `before` are nodes of this graph, with as many edges.
        let status = with_params(shared, node, |params| unsafe {
            shared.driver.cuGraphAddNode_v2(
                &mut handle,
                self.graph,
                before.as_ptr(),
                edges.as_ptr(),
                before.len(),
                params,
            )
        })?;
        shared.check_launch(status, node.kernel.symbol)?;
        let (list, count) = attributes(geometry, false);
        for attribute in list.iter().take(count as usize) {
            // SAFETY: a kernel node of this graph; the value is as long as the header's union.
            let status = unsafe {
                shared.driver.cuGraphKernelNodeSetAttribute(handle, attribute.id, &attribute.value)
            };
            shared.check_launch(status, node.kernel.symbol)?;
        }
        Ok(handle)
    }
}

impl Executable for CudaExecutable {
    unsafe fn set_params(&mut self, index: usize, node: &Node) -> Result<()> {
        let (shared, count) = (&self.shared, self.list.len());
        let missing = || Error::Internal(format!("parameters for node {index} of {count}"));
        self.list.nodes().get(index).ok_or_else(missing)?.check_same_launch(node)?;
        let Exec { handle, template } = self.exec.as_ref().ok_or_else(missing)?;
        let made = *template.nodes.get(index).ok_or_else(missing)?;
        let _entered = shared.enter()?;
        // SAFETY: an executable graph and a node of the graph that it was made of, which is alive; `function` takes
        // one struct of exactly these bytes, which the driver copies before it returns.
        let status = with_params(shared, node, |params| unsafe {
            shared.driver.cuGraphExecNodeSetParams(*handle, made, params)
        })?;
        shared.check_launch(status, node.kernel.symbol)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Drop for CudaExecutable {
    fn drop(&mut self) {
        let Some(Exec { handle, template }) = self.exec.take() else { return };
        let _entered = self.shared.enter_anyway();
        // SAFETY: made in `new` and destroyed once; the driver lets a running replay end first.
        let _ = unsafe { self.shared.driver.cuGraphExecDestroy(handle) };
        drop(template);
    }
}

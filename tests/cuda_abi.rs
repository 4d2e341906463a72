//! Every declaration of `src/device/cuda/sys.rs` against NVIDIA's `cuda.h`: the functions' arguments, the structs'
//! layouts and the constants. The declarations are read from the source and turned into C++ assertions, which the
//! host's compiler checks.
//!
//! The header comes with the compiler wheels (`tools/setup.sh`) or a CUDA toolkit. Without it the test says so and
//! passes, except under CI.

use std::env;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Constants and what the header calls them.
const CONSTANTS: [(&str, &str); 19] = [
    ("SUCCESS", "CUDA_SUCCESS"),
    ("OUT_OF_MEMORY", "CUDA_ERROR_OUT_OF_MEMORY"),
    ("NO_DEVICE", "CUDA_ERROR_NO_DEVICE"),
    ("NOT_READY", "CUDA_ERROR_NOT_READY"),
    ("ATTRIBUTE_SM_COUNT", "CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT"),
    ("ATTRIBUTE_L2_BYTES", "CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE"),
    ("ATTRIBUTE_CAPABILITY_MAJOR", "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR"),
    ("ATTRIBUTE_CAPABILITY_MINOR", "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR"),
    ("FUNCTION_MAX_DYNAMIC_SHARED_BYTES", "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"),
    ("FUNCTION_NON_PORTABLE_CLUSTER", "CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED"),
    ("STREAM_NON_BLOCKING", "CU_STREAM_NON_BLOCKING"),
    ("EVENT_DEFAULT", "CU_EVENT_DEFAULT"),
    ("EVENT_DISABLE_TIMING", "CU_EVENT_DISABLE_TIMING"),
    ("LAUNCH_COOPERATIVE", "CU_LAUNCH_ATTRIBUTE_COOPERATIVE"),
    ("LAUNCH_CLUSTER_DIMENSION", "CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION"),
    ("LAUNCH_PROGRAMMATIC_SERIALIZATION", "CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION"),
    ("INSTANTIATE_UPLOAD", "CUDA_GRAPH_INSTANTIATE_FLAG_UPLOAD"),
    ("EDGE_PROGRAMMATIC", "CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC"),
    ("PORT_PROGRAMMATIC", "CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC"),
];

/// Codes after which a context is dead, as the header calls them.
const STICKY: [&str; 18] = [
    "DEINITIALIZED",
    "ECC_UNCORRECTABLE",
    "NVLINK_UNCORRECTABLE",
    "CONTAINED",
    "ILLEGAL_ADDRESS",
    "LAUNCH_TIMEOUT",
    "CONTEXT_IS_DESTROYED",
    "ASSERT",
    "HARDWARE_STACK_ERROR",
    "ILLEGAL_INSTRUCTION",
    "MISALIGNED_ADDRESS",
    "INVALID_ADDRESS_SPACE",
    "INVALID_PC",
    "LAUNCH_FAILED",
    "TENSOR_MEMORY_LEAK",
    "MPS_CLIENT_TERMINATED",
    "EXTERNAL_DEVICE",
    "UNKNOWN",
];

/// Structs and fields and what the header calls them.
const NAMES: [(&str, &str); 25] = [
    ("LaunchAttribute", "CUlaunchAttribute"),
    ("LaunchAttribute, value", "CUlaunchAttribute, value"),
    ("LaunchConfig", "CUlaunchConfig"),
    ("LaunchConfig, block", "CUlaunchConfig, blockDimX"),
    ("LaunchConfig, shared_bytes", "CUlaunchConfig, sharedMemBytes"),
    ("LaunchConfig, stream", "CUlaunchConfig, hStream"),
    ("LaunchConfig, attributes", "CUlaunchConfig, attrs"),
    ("LaunchConfig, attribute_count", "CUlaunchConfig, numAttrs"),
    ("EdgeData", "CUgraphEdgeData"),
    ("EdgeData, to_port", "CUgraphEdgeData, to_port"),
    ("EdgeData, kind", "CUgraphEdgeData, type"),
    ("KernelNodeParams", "CUgraphNodeParams"),
    ("KernelNodeParams, function", "CUgraphNodeParams, kernel.func"),
    ("KernelNodeParams, grid", "CUgraphNodeParams, kernel.gridDimX"),
    ("KernelNodeParams, block", "CUgraphNodeParams, kernel.blockDimX"),
    ("KernelNodeParams, shared_bytes", "CUgraphNodeParams, kernel.sharedMemBytes"),
    ("KernelNodeParams, arguments", "CUgraphNodeParams, kernel.kernelParams"),
    ("KernelNodeParams, extra", "CUgraphNodeParams, kernel.extra"),
    ("KernelNodeParams, kernel", "CUgraphNodeParams, kernel.kern"),
    ("KernelNodeParams, context", "CUgraphNodeParams, kernel.ctx"),
    ("KernelNodeParams, reserved2", "CUgraphNodeParams, reserved2"),
    ("InstantiateParams", "CUDA_GRAPH_INSTANTIATE_PARAMS"),
    ("InstantiateParams, upload_stream", "CUDA_GRAPH_INSTANTIATE_PARAMS, hUploadStream"),
    ("InstantiateParams, error_node", "CUDA_GRAPH_INSTANTIATE_PARAMS, hErrNode_out"),
    ("InstantiateParams, result", "CUDA_GRAPH_INSTANTIATE_PARAMS, result_out"),
];

const PRELUDE: &str = "
#include <cstddef>
#include <initializer_list>
#include <type_traits>
#include <cuda.h>
struct Argument { std::size_t bytes; bool pointer; };
// Handles are pointers in the header; so are they here.
template <class... A> constexpr bool same(CUresult (*)(A...), std::initializer_list<Argument> ours) {
    if (sizeof...(A) != ours.size()) return false;
    Argument theirs[] = {{sizeof(A), std::is_pointer_v<A>}...};
    std::size_t i = 0;
    for (Argument a : ours) {
        if (a.bytes != theirs[i].bytes || a.pointer != theirs[i].pointer) return false;
        i++;
    }
    return true;
}
";

fn header_folder() -> Option<PathBuf> {
    let local = Path::new(env!("CARGO_MANIFEST_DIR")).join(".cuda/nvidia/cu13/include");
    let toolkits = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os);
    let toolkits = toolkits.map(|path| PathBuf::from(path).join("include"));
    std::iter::once(local)
        .chain(toolkits)
        .chain([PathBuf::from("/usr/local/cuda/include")])
        .find(|folder| folder.join("cuda.h").is_file())
}

/// Bytes of an argument in the C interface, and whether it is a pointer there.
fn argument(kind: &str) -> (usize, bool) {
    match kind.trim() {
        "c_int" | "c_uint" => (4, false),
        "u8" => (1, false),
        "u64" | "usize" => (8, false),
        kind if kind.starts_with('*') => (8, true),
        "Context" | "Module" | "Function" | "StreamHandle" | "EventHandle" | "Graph" | "GraphNode"
        | "GraphExec" => (8, true),
        other => panic!("an argument of type {other}"),
    }
}

/// What stands between `from` and the next `to`.
fn between<'a>(text: &'a str, from: &str, to: &str) -> &'a str {
    let (_, rest) = text.split_once(from).unwrap_or_else(|| panic!("no {from} in sys.rs"));
    rest.split_once(to).unwrap().0
}

fn assertions(source: &str) -> String {
    let mut text = PRELUDE.to_owned();
    let mut functions = 0;
    for declaration in between(source, "\nfunctions! {", "\n}").split(';').map(str::trim) {
        let Some((name, arguments)) = declaration.split_once('(') else { continue };
        let arguments = arguments.trim_end().trim_end_matches(')').split(',').filter(|a| a.contains(':'));
        let arguments: Vec<String> = arguments
            .map(|a| {
                let (bytes, pointer) = argument(a.split_once(':').unwrap().1);
                format!("{{{bytes}, {pointer}}}")
            })
            .collect();
        writeln!(text, "static_assert(same(&{name}, {{{}}}), \"{name}\");", arguments.join(", ")).unwrap();
        functions += 1;
    }
    assert!(functions > 40, "{functions} functions");
    let mut layouts = 0;
    for line in source.lines().map(str::trim) {
        let (call, rest) =
            match (line.strip_prefix("assert!(size_of::<"), line.strip_prefix("assert!(offset_of!(")) {
                (Some(rest), _) => ("sizeof", rest.replace(">()", "")),
                (_, Some(rest)) => ("offsetof", rest.replacen(')', "", 1)),
                _ => continue,
            };
        let (ours, value) = rest.trim_end_matches(");").split_once(" == ").unwrap();
        let (_, theirs) = NAMES.iter().find(|(name, _)| *name == ours).unwrap_or_else(|| panic!("{ours}"));
        writeln!(text, "static_assert({call}({theirs}) == {value}, \"{ours}\");").unwrap();
        layouts += 1;
    }
    assert_eq!(layouts, NAMES.len());
    for (ours, theirs) in CONSTANTS {
        let line = between(source, &format!("const {ours}: "), ";");
        let value = line.split_once(" = ").unwrap().1;
        writeln!(text, "static_assert({theirs} == {value}, \"{ours}\");").unwrap();
    }
    let codes: Vec<i32> = between(source, "const STICKY", "];")
        .lines()
        .filter_map(|line| line.trim().split_once(',')?.0.parse().ok())
        .collect();
    assert_eq!(codes.len(), STICKY.len());
    for (code, name) in codes.iter().zip(STICKY) {
        writeln!(text, "static_assert(CUDA_ERROR_{name} == {code}, \"{name}\");").unwrap();
    }
    text
}

#[test]
fn declarations_are_those_of_the_header() {
    let Some(include) = header_folder() else {
        assert!(env::var_os("CI").is_none(), "no cuda.h under CI");
        eprintln!("skipped: no cuda.h here; tools/setup.sh installs one");
        return;
    };
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/device/cuda/sys.rs");
    let text = assertions(&std::fs::read_to_string(source).unwrap());
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("abi.cpp");
    std::fs::write(&file, text).unwrap();
    let compiler = env::var("CXX").unwrap_or_else(|_| "c++".into());
    let output = Command::new(compiler)
        .args(["-std=c++20", "-fsyntax-only", "-Wno-invalid-offsetof", "-I"])
        .arg(include)
        .arg(&file)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

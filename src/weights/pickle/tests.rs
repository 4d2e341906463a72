use super::*;

/// Writes the pickle opcodes that torch writes, for tests of this module and of the archive reader.
pub(in crate::weights) fn pickle_dict(entries: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let items = entries.iter().flat_map(|(name, value)| [unicode(name), value.clone()].concat());
    [b"\x80\x02}(".to_vec(), items.collect(), b"u.".to_vec()].concat()
}

pub(in crate::weights) fn unicode(text: &str) -> Vec<u8> {
    [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
}

fn tuple(values: &[u64]) -> Vec<u8> {
    [b"(".to_vec(), values.iter().flat_map(|&v| int(v)).collect(), b"t".to_vec()].concat()
}

/// LONG1 of eight bytes.
fn int(value: u64) -> Vec<u8> {
    [&[0x8a, 8], &value.to_le_bytes()[..]].concat()
}

/// `_rebuild_tensor_v2(storage, offset, size, stride, False, OrderedDict())`.
pub(in crate::weights) fn tensor(
    class: &str,
    key: &str,
    elements: u64,
    offset: u64,
    shape: &[u64],
    stride: &[u64],
) -> Vec<u8> {
    [
        b"ctorch._utils\n_rebuild_tensor_v2\n((".to_vec(),
        unicode("storage"),
        format!("ctorch\n{class}\n").into_bytes(),
        unicode(key),
        unicode("cpu"),
        int(elements),
        b"tQ".to_vec(),
        int(offset),
        tuple(shape),
        tuple(stride),
        b"\x89ccollections\nOrderedDict\n)RtR".to_vec(),
    ]
    .concat()
}

fn float() -> Vec<u8> {
    tensor("FloatStorage", "0", 6, 0, &[2, 3], &[3, 1])
}

#[test]
fn reads_a_dictionary_of_tensors() {
    let parameter = [b"ctorch._utils\n_rebuild_parameter\n(".to_vec(), float(), b"\x88}tR".to_vec()].concat();
    let found = read_state_dict(&pickle_dict(&[("a", float()), ("b", parameter)])).unwrap();
    let expected = PickledTensor {
        storage_class: "FloatStorage".into(),
        key: "0".into(),
        storage_elements: 6,
        offset: 0,
        shape: vec![2, 3],
        stride: vec![3, 1],
    };
    assert_eq!(found, [("a".to_owned(), expected.clone()), ("b".to_owned(), expected)]);
}

#[test]
fn reads_a_state_dict_with_metadata() {
    // OrderedDict() filled item by item, then BUILD with {"_metadata": {"": {"version": 1}}}.
    let body = [unicode("a"), float(), b"s".to_vec()].concat();
    let version =
        [b"}".to_vec(), unicode(""), b"}".to_vec(), unicode("version"), b"K\x01ss".to_vec()].concat();
    let state = [b"}".to_vec(), unicode("_metadata"), version, b"s".to_vec()].concat();
    let pickle = [b"\x80\x02ccollections\nOrderedDict\n)R".to_vec(), body, state, b"b.".to_vec()].concat();
    let found = read_state_dict(&pickle).unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].0, "a");
}

#[test]
fn protocol_4_imports_and_frames() {
    let body =
        [&b"\x80\x04\x95\0\0\0\0\0\0\0\0\x8c\x0bcollections\x94\x8c\x0bOrderedDict\x94\x93)R\x94."[..]]
            .concat();
    assert_eq!(read_state_dict(&body).unwrap(), []);
}

#[test]
fn other_imports_are_refused_by_name() {
    for (module, name) in
        [("os", "system"), ("builtins", "eval"), ("torch._utils", "_rebuild_tensor"), ("a\u{1b}", "b")]
    {
        let pickle = [b"\x80\x02c", format!("{module}\n{name}\n").as_bytes()].concat();
        let error = read_state_dict(&pickle).unwrap_err();
        assert!(error.contains(&format!("{}.{name}", super::super::escape(module))), "{error}");
        assert!(!error.contains('\u{1b}'));
    }
}

#[test]
fn depth_costs_nothing() {
    // A tuple of a tuple of ... a million deep: neither interpreting nor dropping it may recurse.
    let pickle = [b"\x80\x02)".to_vec(), vec![0x85; 1_000_000], b".".to_vec()].concat();
    assert!(read_state_dict(&pickle).unwrap_err().contains("a tuple"));
}

#[test]
fn broken_pickles_are_errors() {
    let good = pickle_dict(&[("a", float())]);
    for length in 0..good.len() {
        assert!(read_state_dict(&good[..length]).is_err(), "cut at {length}");
    }
    let cases: [(&[u8], &str); 10] = [
        (b"\x80\x02K\x01.", "an integer"),
        (b"\x80\x02}K\x01K\x02s.", "a key of the dictionary"),
        (b"\x80\x02}(K\x01u.", "no value"),
        (b"\x80\x02h\x05.", "memo slot 5"),
        (b"\x80\x02t.", "mark is missing"),
        (b"\x80\x02(.", "stack is empty"),
        (b"\x80\x02NN.", "left on the stack"),
        (b"\x80\x02N)R.", "a call of None"),
        (b"\x80\x02)Q.", "not a storage"),
        (b"\x80\x02I5\n.", "opcode 0x49"),
    ];
    for (pickle, expected) in cases {
        let error = read_state_dict(pickle).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
    let text = pickle_dict(&[("step", b"K\x01".to_vec())]);
    assert!(read_state_dict(&text).unwrap_err().contains("entry step is an integer"));
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(256))]

    #[test]
    fn changed_bytes_never_panic(at in 0usize..400, value: u8, cut in 0usize..400) {
        let mut pickle = pickle_dict(&[("a", float()), ("b", float())]);
        let at = at % pickle.len();
        pickle[at] = value;
        let _ = read_state_dict(&pickle);
        pickle.truncate(cut);
        let _ = read_state_dict(&pickle);
    }
}

/// Two megabytes of pickle that named one tuple of a million numbers again and again took two gigabytes.
#[test]
fn what_is_named_again_and_again_is_not_copied_without_end() {
    let refused = |pickle: &[u8]| read_state_dict(pickle).unwrap_err();
    let many = vec![1; 65];
    let said = refused(&pickle_dict(&[("a", tensor("FloatStorage", "0", 1, 0, &many, &many))]));
    assert!(said.contains("65 dimensions of a tensor, at most 64 are read"), "{said}");
    let said = refused(&pickle_dict(&[("a", tensor(&format!("{:>65}", "Storage"), "0", 1, 0, &[1], &[1]))]));
    assert!(said.contains("65 bytes of a storage's class, at most 64"), "{said}");
    let said = refused(&pickle_dict(&[("a", tensor("FloatStorage", &"0".repeat(257), 1, 0, &[1], &[1]))]));
    assert!(said.contains("257 bytes of a storage's key, at most 256"), "{said}");
    let said = refused(&pickle_dict(&[(&"a".repeat(1025), float())]));
    assert!(said.contains("1025 bytes of a tensor's name, at most 1024"), "{said}");
    // One name and one tensor, set 65,537 times by five bytes each.
    let first =
        [b"\x80\x02}".to_vec(), unicode("a"), b"q\x00".to_vec(), float(), b"q\x01s".to_vec()].concat();
    let said = refused(&[first, b"h\x00h\x01s".repeat(1 << 16), b".".to_vec()].concat());
    assert!(said.contains("65537 entries of the dictionary, at most 65536"), "{said}");
}

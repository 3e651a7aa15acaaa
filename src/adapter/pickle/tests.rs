//! Files of real torch against the values that went in, and hand-made archives, one per lie.

use super::*;
use crate::dtype::Dtype;
use std::time::{Duration, Instant};

/// What tests/golden/pickle/make.py wrote.
const GOLDEN: [(&str, &[u8]); 6] = [
    ("zip", include_bytes!("../../../tests/golden/pickle/zip.pt")),
    ("legacy", include_bytes!("../../../tests/golden/pickle/legacy.pt")),
    ("protocol4", include_bytes!("../../../tests/golden/pickle/protocol4.pt")),
    ("legacy_protocol5", include_bytes!("../../../tests/golden/pickle/legacy_protocol5.pt")),
    ("nested", include_bytes!("../../../tests/golden/pickle/nested.pt")),
    ("module", include_bytes!("../../../tests/golden/pickle/module.pt")),
];

fn golden(name: &str) -> Pickled {
    let (_, bytes) = GOLDEN.into_iter().find(|(n, _)| *n == name).unwrap();
    from_bytes(bytes.to_vec()).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn names(pickled: &Pickled) -> Vec<&str> {
    pickled.tensors.iter().map(|(name, _)| name.as_str()).collect()
}

fn tensor<'a>(pickled: &'a Pickled, name: &str) -> &'a Tensor {
    &pickled.tensors.iter().find(|(n, _)| n == name).unwrap_or_else(|| panic!("{name} is missing")).1
}

fn f32s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn text_map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect()
}

/// The sentence with which a file is refused.
fn refused(bytes: Vec<u8>) -> String {
    let error = from_bytes(bytes).map(|p| format!("{p:?}")).expect_err("this file lies");
    assert!(!error.hint().is_empty());
    let text = error.to_string();
    text.strip_prefix("<memory>: ").unwrap_or_else(|| panic!("{text}")).to_owned()
}

#[test]
fn both_formats_of_torch_hold_what_was_saved() {
    let base: Vec<f32> = (0..12).map(|i| i as f32 / 8.0 - 0.5).collect();
    let pick = |indices: &[usize]| f32s(&indices.iter().map(|&i| base[i]).collect::<Vec<_>>());
    let le16 = |bits: [u16; 4]| bits.iter().flat_map(|b| b.to_le_bytes()).collect::<Vec<u8>>();
    let expected: Vec<(&str, Dtype, &[usize], Vec<u8>)> = vec![
        ("m.lora_up.weight", Dtype::F32, &[3, 4], f32s(&base)),
        ("m.lora_down.weight", Dtype::F32, &[4, 3], pick(&[0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11])),
        ("m.alpha", Dtype::F32, &[], f32s(&[4.0])),
        ("int.alpha", Dtype::F32, &[], f32s(&[8.0])),
        ("float.alpha", Dtype::F32, &[], f32s(&[0.5])),
        ("alpha", Dtype::F32, &[], f32s(&[2.0])),
        ("rows", Dtype::F32, &[2, 4], f32s(&base[4..])),
        ("columns", Dtype::F32, &[3, 2], pick(&[1, 3, 5, 7, 9, 11])),
        ("permuted", Dtype::F32, &[2, 2, 3], pick(&[0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11])),
        ("expanded", Dtype::F32, &[2, 2], f32s(&[1.5; 4])),
        ("tied", Dtype::F32, &[3, 4], f32s(&base)),
        ("parameter", Dtype::F32, &[1, 2], f32s(&[1.0, -2.0])),
        ("half", Dtype::F16, &[4], le16([0xb800, 0xb600, 0xb400, 0xb000])),
        ("bfloat16", Dtype::BF16, &[4], le16([0xbf00, 0xbec0, 0xbe80, 0xbe00])),
        ("double", Dtype::F64, &[2], [-0.5f64, -0.375].iter().flat_map(|v| v.to_le_bytes()).collect()),
        ("long", Dtype::I64, &[2], [-(1i64 << 40), 7].iter().flat_map(|v| v.to_le_bytes()).collect()),
        ("bool", Dtype::BOOL, &[3], vec![1, 0, 1]),
        ("float8", Dtype::F8_E4M3, &[4], vec![0xb0, 0xac, 0xa8, 0xa0]),
        ("empty", Dtype::F32, &[3, 0], vec![]),
    ];
    for name in ["zip", "legacy"] {
        let pickled = golden(name);
        assert_eq!(names(&pickled), expected.iter().map(|e| e.0).collect::<Vec<_>>(), "{name}");
        for ((key, dtype, shape, bytes), (_, got)) in expected.iter().zip(&pickled.tensors) {
            assert_eq!((got.dtype(), got.shape()), (*dtype, *shape), "{name}: {key}");
            assert_eq!(got.bytes().unwrap(), bytes, "{name}: {key}");
        }
        let metadata = [("ss_network_module", "networks.lora"), ("ss_tag", "é")];
        assert_eq!(pickled.metadata, text_map(&metadata), "{name}");
    }
}

#[test]
fn only_strided_tensors_are_copied() {
    let pickled = golden("zip");
    let address = |name| tensor(&pickled, name).data() as usize;
    assert_eq!(address("tied"), address("m.lora_up.weight"));
    assert_eq!(address("rows"), address("m.lora_up.weight") + 16);
}

#[test]
fn newer_pickle_protocols_read_the_same() {
    for name in ["protocol4", "legacy_protocol5"] {
        let pickled = golden(name);
        assert_eq!(names(&pickled), ["a.lora_up.weight", "a.alpha"], "{name}");
        assert_eq!(tensor(&pickled, "a.lora_up.weight").to_f32("a").unwrap()[11], 0.875, "{name}");
        assert_eq!(tensor(&pickled, "a.alpha").scalar(), Some(4.0), "{name}");
    }
}

#[test]
fn the_state_dict_inside_is_taken() {
    let pickled = golden("nested");
    assert_eq!(names(&pickled), ["a.lora_up.weight", "a.alpha"]);
    assert_eq!(pickled.metadata, text_map(&[("ss_tag", "outer")]));
    let pickled = golden("module");
    assert_eq!(names(&pickled), ["weight", "bias"]);
    assert_eq!(tensor(&pickled, "weight").to_f32("weight").unwrap(), [1.0, 2.0]);
    assert_eq!(tensor(&pickled, "bias").to_f32("bias").unwrap(), [3.0]);
}

#[test]
fn a_mapped_file_outlives_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.pt");
    std::fs::write(&path, GOLDEN[0].1).unwrap();
    let pickled = open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    assert_eq!(tensor(&pickled, "parameter").to_f32("p").unwrap(), [1.0, -2.0]);
    let error = open(&path).unwrap_err();
    assert_eq!(error.file(), Some(path.as_path()));
}

#[test]
fn beginnings_tell_the_formats_apart() {
    for (name, bytes) in GOLDEN {
        assert!(is_pickle(&bytes[..24]), "{name}");
    }
    // Safetensors whose header length begins like the archive's signature, like a pickle, and like nothing.
    for length in [0x0403_4b50u64, 0x0280, 64] {
        assert!(!is_pickle(&[&length.to_le_bytes()[..], b"{\"a\":{\"dtype\":\"F32\""].concat()));
    }
    assert!(!is_pickle(b"") && !is_pickle(b"\x80\x02") && !is_pickle(b"PK\x05\x06"));
}

#[test]
fn every_cut_is_one_sentence() {
    for (name, bytes) in GOLDEN {
        for len in 0..bytes.len() {
            let text = refused(bytes[..len].to_vec());
            assert!(text.len() < 300 && !text.contains('\n'), "{name} cut at {len}: {text}");
        }
    }
}

#[test]
fn damaged_bytes_never_panic() {
    // xorshift64: the same files on every run.
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    let (started, mut read) = (Instant::now(), 0);
    for round in 0..20_000 {
        let mut bytes = GOLDEN[round % GOLDEN.len()].1.to_vec();
        for _ in 0..=random(4) {
            let at = random(bytes.len());
            match random(8) {
                0 => bytes.truncate(at.max(1)),
                1 => bytes[at] = [0x00, 0xff, 0x7f, 0x80][random(4)],
                _ => bytes[at] ^= 1 << random(8),
            }
        }
        let size = bytes.len();
        if let Ok(pickled) = from_bytes(bytes) {
            read += 1;
            for (name, tensor) in &pickled.tensors {
                assert_eq!(tensor.bytes().map(<[u8]>::len), Some(tensor.byte_len()), "{name}");
                assert!(tensor.byte_len() <= size.max(4), "{name}");
            }
        }
    }
    // Many flips hit the tensors' bytes or the padding; most others must be noticed.
    assert!((1_000..19_000).contains(&read), "{read} of 20000 damaged files read");
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
}

// Pickles by hand.

fn text(text: &str) -> Vec<u8> {
    [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
}

fn int(value: i64) -> Vec<u8> {
    [b"\x8a\x08", &value.to_le_bytes()[..]].concat()
}

fn tuple(items: &[Vec<u8>]) -> Vec<u8> {
    [b"(", &items.concat()[..], b"t"].concat()
}

fn ints(values: &[i64]) -> Vec<u8> {
    tuple(&values.iter().map(|&v| int(v)).collect::<Vec<_>>())
}

fn dict(pairs: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let items: Vec<u8> = pairs.iter().flat_map(|(key, value)| [text(key), value.clone()].concat()).collect();
    [b"}(", &items[..], b"u"].concat()
}

fn storage(count: i64) -> Vec<u8> {
    let id = [text("storage"), b"ctorch\nFloatStorage\n".to_vec(), text("0"), text("cpu"), int(count)];
    [tuple(&id), b"Q".to_vec()].concat()
}

/// A tensor over the storage `0`, which has `count` elements.
fn rebuilt(count: i64, offset: i64, shape: &[i64], strides: &[i64]) -> Vec<u8> {
    let args = [storage(count), int(offset), ints(shape), ints(strides), b"\x89".to_vec(), b"}".to_vec()];
    [b"ctorch._utils\n_rebuild_tensor_v2\n".to_vec(), tuple(&args), b"R".to_vec()].concat()
}

fn pickle(body: &[u8]) -> Vec<u8> {
    [b"\x80\x02", body, b"."].concat()
}

/// A zip archive of stored entries.
fn zipped(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut bytes, mut directory) = (Vec::new(), Vec::new());
    for (name, data) in entries {
        let (offset, size) = ((bytes.len() as u32).to_le_bytes(), (data.len() as u32).to_le_bytes());
        let name_len = (name.len() as u16).to_le_bytes();
        let fields = [&[0; 12][..], &size, &size, &name_len, &[0, 0]].concat();
        bytes.extend([b"PK\x03\x04\x14\0", &fields[..], name.as_bytes(), data].concat());
        directory
            .extend([b"PK\x01\x02\x14\0\x14\0", &fields[..], &[0; 10], &offset, name.as_bytes()].concat());
    }
    let (count, offset) = ((entries.len() as u16).to_le_bytes(), (bytes.len() as u32).to_le_bytes());
    let size = (directory.len() as u32).to_le_bytes();
    bytes.extend(directory);
    bytes.extend([b"PK\x05\x06\0\0\0\0", &count[..], &count, &size, &offset, &[0, 0]].concat());
    bytes
}

/// An archive like torch's with this object and one storage of four elements.
fn saved(object: &[u8]) -> Vec<u8> {
    zipped(&[("a/data.pkl", &pickle(object)), ("a/data/0", &f32s(&[1.0, 2.0, 3.0, 4.0]))])
}

/// The same with one tensor, `w`.
fn saved_tensor(count: i64, offset: i64, shape: &[i64], strides: &[i64]) -> Vec<u8> {
    saved(&dict(&[("w", rebuilt(count, offset, shape, strides))]))
}

#[test]
fn hand_made_files_read() {
    let pickled = from_bytes(saved_tensor(4, 1, &[3], &[1])).unwrap();
    assert_eq!(tensor(&pickled, "w").to_f32("w").unwrap(), [2.0, 3.0, 4.0]);
    let pickled = from_bytes(saved_tensor(4, 0, &[2, 2], &[1, 2])).unwrap();
    assert_eq!(tensor(&pickled, "w").to_f32("w").unwrap(), [1.0, 3.0, 2.0, 4.0]);
}

#[test]
fn nothing_is_run() {
    let system = |global: &[u8]| saved(&[global, &tuple(&[text("true")]), b"R"].concat());
    let expected =
        "asks for `os.system` (byte 2 of its pickle): refused, for a file that asks for more than \
                    tensors, numbers and text could run code";
    assert_eq!(refused(system(b"cos\nsystem\n")), expected);
    let by_stack = [text("os"), text("system"), b"\x93".to_vec()].concat();
    assert!(refused(system(&by_stack)).starts_with("asks for `os.system`"));
    for global in
        ["builtins\neval", "torch\nload", "torch\n", "torch.serialization\nload", "collections\ndefaultdict"]
    {
        let text = refused(saved(format!("c{global}\n)R").as_bytes()));
        assert!(text.contains(&global.replace('\n', ".")), "{text}");
    }
    let error = from_bytes(system(b"cos\nsystem\n")).unwrap_err();
    assert_eq!(error.hint(), "convert it to safetensors with a program that you trust");
    // INST, OBJ, NEWOBJ, EXT1: other ways to call.
    for op in [&b"(ios\nsystem\n"[..], b"(o", b"\x81", b"\x82\x01"] {
        let text = refused(saved(op));
        assert!(text.contains("has no place in a file of tensors"), "{text}");
    }
    let long = refused(saved(format!("c{}\nx\n", "\u{1}".repeat(5000)).as_bytes()));
    assert!(long.len() < 300 && long.contains("\\u{1}"), "{long}");
}

#[test]
fn lies_of_the_pickle_are_refused() {
    let bomb = [vec![b']'; 1 << 20], b"N".to_vec()].concat();
    let marks = vec![b'('; 1 << 21];
    let deep = (0..20).fold(dict(&[("w", rebuilt(4, 0, &[4], &[1]))]), |inner, _| dict(&[("d", inner)]));
    let two = dict(&[
        ("unet", dict(&[("w", rebuilt(4, 0, &[4], &[1]))])),
        ("te", dict(&[("w", rebuilt(4, 0, &[4], &[1]))])),
    ]);
    let cases: [(&[u8], &str); 22] = [
        (&bomb, "the pickle has more than 1048576 opcodes"),
        (&marks, "the pickle has more than 1048576 opcodes"),
        (&deep, "nests dicts more than 16 deep"),
        (&two, "holds several dicts of tensors (`unet`, `te`) and none called `state_dict`"),
        // A dict that holds itself.
        (b"}q\0X\x01\0\0\0ah\0s", "holds no tensor under a name"),
        (b"h\x07", "recalls memo 7, which was never set (opcode 0x68 at byte 2 of the pickle)"),
        (b"j\xff\xff\xff\xff", "recalls memo 4294967295, which was never set"),
        (b"q\0", "needs a value on an empty stack"),
        (b"", "takes a value from an empty stack"),
        (b"t", "closes a container that was never opened"),
        (b"N(\x85", "takes a value from an empty stack"),
        (b"](", "this opcode has no place"),
        (b"]N0", "this opcode has no place"),
        (b"NNa", "appends to something else than a list"),
        (b"]NNs", "sets keys on something else than a dict"),
        (b"}(Nu", "sets a key without a value"),
        (b"NNb", "attributes on something else than a dict"),
        (b"N)R", "calls something that is no function"),
        (b"NQ", "a reference that is no storage"),
        (b"X\xff\xff\xff\xffabc", "the pickle is cut off (opcode 0x58 at byte 2"),
        (b"X\x01\0\0\0\xff", "text that is not UTF-8"),
        (b"N", "does not hold a dict of tensors"),
    ];
    for (body, expected) in cases {
        let text = refused(saved(body));
        assert!(text.starts_with(expected), "{text}\n{expected}");
    }
    assert!(refused(zipped(&[("a/data.pkl", b"\x80\x06N.")])).starts_with("pickle protocol 6"));
    assert!(refused(saved(&dict(&[("w", rebuilt(4, 0, &[4], &[1])), ("w", b"N".to_vec())])))
        .contains("`w` twice"));
    let unnamed = [b"}K\x01", &rebuilt(4, 0, &[4], &[1])[..], b"s"].concat();
    assert!(refused(saved(&unnamed)).contains("something else than a name"));
}

#[test]
fn lies_of_a_tensor_are_refused() {
    const HUGE: i64 = 1 << 62;
    let reach = "reaches past its 16 bytes";
    let numbers = "are not up to 8 numbers from 0 on";
    for (count, offset, shape, strides, expected) in [
        (4, 0, &[5][..], &[1][..], reach),
        (4, 1, &[4], &[1], reach),
        (4, 0, &[2, 2], &[3, 1], reach),
        (4, 4, &[], &[], reach),
        (4, HUGE, &[1], &[1], reach),
        (4, 0, &[2], &[HUGE], reach),
        (4, 0, &[3, 3], &[HUGE, HUGE], reach),
        (4, 3, &[4], &[-1], numbers),
        (4, -1, &[1], &[1], numbers),
        (4, 0, &[-1], &[1], numbers),
        (4, 0, &[1; 9], &[1; 9], numbers),
        (4, 0, &[2, 2], &[1], "has 2 axes and 1 strides"),
        (4, 0, &[HUGE, 8], &[0, 0], "more bytes than 64 bits can count"),
        (4, 0, &[HUGE, 8, 0], &[0, 0, 0], "more bytes than 64 bits can count"),
        (5, 0, &[4], &[1], "its storage holds 16 bytes, not the 5 elements of F32"),
        (3, 0, &[3], &[1], "its storage holds 16 bytes, not the 3 elements of F32"),
        (HUGE, 0, &[4], &[1], "its storage holds 16 bytes"),
        // One element, repeated until memory ends.
        (4, 0, &[1 << 20, 1 << 20], &[0, 0], "repeat more elements than the file has bytes"),
    ] {
        let text = refused(saved_tensor(count, offset, shape, strides));
        assert!(text.contains("tensor `w`") && text.contains(expected), "{text}\n{expected}");
    }
    assert!(refused(saved_tensor(-1, 0, &[4], &[1])).starts_with("a reference that is no storage"));
    let alone = zipped(&[("a/data.pkl", &pickle(&dict(&[("w", rebuilt(4, 0, &[4], &[1]))])))]);
    assert_eq!(refused(alone), "tensor `w`: its storage `0` is not in the file");
    // Many transposed views of one storage: each fits, all together would not.
    let views: Vec<String> = (0..2000).map(|i| format!("{i}")).collect();
    let id = [&storage(4)[..], b"q\x01"].concat();
    let view = |first: bool| {
        let args =
            [int(0), b"K\x02K\x02\x86".to_vec(), b"K\x01K\x02\x86".to_vec(), b"\x89N".to_vec()].concat();
        let id = if first { &id[..] } else { b"h\x01" };
        [b"ctorch._utils\n_rebuild_tensor_v2\n(", id, &args, b"tR"].concat()
    };
    let pairs: Vec<_> = views.iter().enumerate().map(|(i, name)| (name.as_str(), view(i == 0))).collect();
    let copied: usize =
        from_bytes(saved(&dict(&pairs))).unwrap().tensors.iter().map(|(_, t)| t.byte_len()).sum();
    assert_eq!(copied, 32_000, "a file of more than 100000 bytes may spend them");
}

#[test]
fn lies_of_the_archive_are_refused() {
    let good = saved_tensor(4, 0, &[4], &[1]);
    from_bytes(good.clone()).unwrap();
    let find = |signature: &[u8], n: usize| {
        good.windows(4).enumerate().filter(|(_, w)| *w == signature).map(|(i, _)| i).nth(n).unwrap()
    };
    let (local, central, end) = (find(b"PK\x03\x04", 1), find(b"PK\x01\x02", 1), find(b"PK\x05\x06", 0));
    let outside = "zip entry `a/data/0` does not lie inside the file";
    let short = "the zip directory ends before its entry";
    let none = "is a zip archive without its directory";
    let cases: [(usize, &[u8], &str); 19] = [
        (central + 8, &[1, 0], "zip entry `a/data/0` is encrypted"),
        (central + 10, &[8, 0], "zip entry `a/data/0` is compressed (method 8)"),
        (
            central + 20,
            &[0xff, 0, 0, 0],
            "zip entry `a/data/0` is stored, but claims 255 bytes in the file and 16",
        ),
        (central + 20, &[17, 0, 0, 0, 17, 0, 0, 0], outside),
        (central + 20, &[0xfe, 0xff, 0xff, 0xff, 0xfe, 0xff, 0xff, 0xff], outside),
        // All ones ask for a zip64 field, which is not there.
        (central + 24, &[0xff; 4], short),
        (central + 42, &[0; 4], outside),
        (central + 42, &[0xf0, 0xff, 0xff, 0xff], outside),
        (central + 28, &[0xff, 0xff], short),
        (central + 46, b"b", "zip entry `b/data/0` does not lie inside the file"),
        (local + 8, &[8, 0], outside),
        (local + 6, &[1, 0], outside),
        (local + 28, &[1, 0], outside),
        (local, b"XX", outside),
        (end + 8, &[3, 0, 3, 0], "the zip directory ends before its entry 2 of 3"),
        (end + 8, &[1, 0, 1, 0], "the zip directory holds more than the 1 entries"),
        (end + 12, &[0xff, 0xff, 0xff, 0x7f], none),
        (end + 16, &[0xff; 4], none),
        (end + 20, &[1, 0], none),
    ];
    for (at, patch, expected) in cases {
        let mut bytes = good.clone();
        bytes[at..at + patch.len()].copy_from_slice(patch);
        let text = refused(bytes);
        assert!(text.starts_with(expected), "{text}\n{expected}");
    }
    let data = f32s(&[1.0; 4]);
    let twice = [("a/data.pkl", &b"\x80\x02N."[..]), ("a/data/0", &data), ("a/data/0", &data)];
    assert_eq!(refused(zipped(&twice)), "the zip archive names `a/data/0` twice");
    // An entry whose data is another entry.
    let inner = zipped(&[("b", b"")]);
    let mut nested = zipped(&[("a/data.pkl", &inner), ("b", b"")]);
    let at = nested.windows(4).rposition(|w| w == b"PK\x01\x02").unwrap();
    nested[at + 42..at + 46].copy_from_slice(&40u32.to_le_bytes());
    assert_eq!(refused(nested), "zip entries `a/data.pkl` and `b` share bytes");
    assert!(refused(zipped(&[("a/model.pkl", b"")])).contains("no data.pkl, or several"));
    assert!(refused(zipped(&[("a/data.pkl", b""), ("b/data.pkl", b"")])).contains("no data.pkl, or several"));
    let big = zipped(&[("a/data.pkl", b"\x80\x02N."), ("a/byteorder", b"big")]);
    assert_eq!(refused(big), "was written by a big-endian machine");
}

#[test]
fn archives_past_32_bits_name_their_sizes_in_longer_fields() {
    let good = saved_tensor(4, 0, &[4], &[1]);
    let end = good.len() - 22;
    let field = |at: usize| u64::from(u32::from_le_bytes(good[at..at + 4].try_into().unwrap())).to_le_bytes();
    let central = good.windows(4).rposition(|w| w == b"PK\x01\x02").unwrap();
    // The last entry of the directory, with all three numbers in an extra field behind one of another kind.
    let extra = [
        b"\x42\x46\x02\0..\x01\0\x18\0",
        &field(central + 24)[..],
        &field(central + 20),
        &field(central + 42),
    ]
    .concat();
    let mut entry = good[central..end].to_vec();
    entry[20..28].fill(0xff);
    entry[42..46].fill(0xff);
    entry[30] = extra.len() as u8;
    let size = u64::from_le_bytes(field(end + 12)) + extra.len() as u64;
    let mut long = [&good[..central], &entry, &extra].concat();
    let at = long.len() as u64;
    let counts = [2u64.to_le_bytes(), 2u64.to_le_bytes(), size.to_le_bytes(), field(end + 16)].concat();
    long.extend([b"PK\x06\x06", &44u64.to_le_bytes()[..], &[0; 12], &counts].concat());
    long.extend([b"PK\x06\x07\0\0\0\0", &at.to_le_bytes()[..], &[1, 0, 0, 0]].concat());
    long.extend([b"PK\x05\x06\0\0\0\0", &[0xff; 12][..], &[0, 0]].concat());
    let pickled = from_bytes(long.clone()).unwrap();
    assert_eq!(tensor(&pickled, "w").to_f32("w").unwrap(), [1.0, 2.0, 3.0, 4.0]);
    // Sizes, counts and offsets of the longer records lie, too.
    let record = at as usize;
    for (at, expected) in [
        (
            central + 46 + 8 + 10,
            "zip entry `a/data/0` is stored, but claims 16 bytes in the file and 18446744073709551615",
        ),
        (central + 46 + 8 + 26, "zip entry `a/data/0` does not lie inside the file"),
        (record + 32, "the zip directory ends before its entry 2 of 18446744073709551615"),
        (record + 40, "is a zip archive without its directory"),
        (record + 48, "is a zip archive without its directory"),
        (record + 56 + 8, "is a zip archive without its directory"),
    ] {
        let mut bytes = long.clone();
        bytes[at..at + 8].fill(0xff);
        let text = refused(bytes);
        assert!(text.starts_with(expected), "{text}\n{expected}");
    }
}

#[test]
fn lies_of_the_older_format_are_refused() {
    let magic = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.";
    let id =
        [text("storage"), b"ctorch\nFloatStorage\n".to_vec(), text("0"), text("cpu"), int(2), b"N".to_vec()];
    let args = [tuple(&id), b"Q".to_vec(), int(0), ints(&[2]), ints(&[1]), b"\x89N".to_vec()];
    let object = dict(&[(
        "w",
        [b"ctorch._utils\n_rebuild_tensor_v2\n(".to_vec(), args.concat(), b"tR".to_vec()].concat(),
    )]);
    let file = |protocol: &[u8], system: &[u8], keys: &[u8], data: &[u8]| {
        [&magic[..], &pickle(protocol), &pickle(system), &pickle(&object), &pickle(keys), data].concat()
    };
    let (protocol, little) = (int(1001), dict(&[("little_endian", b"\x88".to_vec())]));
    let one = [b"]".to_vec(), text("0"), b"a".to_vec()].concat();
    let data = [&2u64.to_le_bytes()[..], &f32s(&[5.0, 6.0])].concat();
    let pickled = from_bytes(file(&protocol, &little, &one, &data)).unwrap();
    assert_eq!(tensor(&pickled, "w").to_f32("w").unwrap(), [5.0, 6.0]);

    let big = dict(&[("little_endian", b"\x89".to_vec())]);
    let other = [b"]".to_vec(), text("1"), b"a".to_vec()].concat();
    let both = [&one[..], &text("0"), b"a"].concat();
    let counted = |count: u64| [&count.to_le_bytes()[..], &f32s(&[5.0, 6.0])].concat();
    for (bytes, expected) in [
        (file(&int(1000), &little, &one, &data), "is not of torch's protocol 1001"),
        (file(&protocol, &big, &one, &data), "was written by a big-endian machine"),
        (file(&protocol, b"N", &one, &data), "was written by a big-endian machine"),
        (file(&protocol, &little, &other, &data), "lists a storage that no tensor uses"),
        (file(&protocol, &little, &both, &[&data[..], &data].concat()), "lists storage `0` twice"),
        (file(&protocol, &little, b"]", b""), "tensor `w`: its storage `0` is not in the file"),
        (file(&protocol, &little, &one, &counted(3)), "storage `0` ends after the file"),
        (file(&protocol, &little, &one, &counted(u64::MAX)), "storage `0` ends after the file"),
        (file(&protocol, &little, &one, &counted(u64::MAX / 4)), "storage `0` ends after the file"),
        (file(&protocol, &little, &one, &counted(1)), "4 bytes after the last storage belong to none"),
        (
            file(&protocol, &little, &one, &counted(1)[..12]),
            "tensor `w`: its storage holds 4 bytes, not the 2",
        ),
    ] {
        let text = refused(bytes);
        assert!(text.starts_with(expected), "{text}\n{expected}");
    }
}

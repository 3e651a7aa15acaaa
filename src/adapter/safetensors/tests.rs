//! Files there and back, with the `safetensors` crate as the independent reader and writer.

use super::*;
use crate::dtype::byte_len;
use safetensors::tensor::TensorView;
use safetensors::SafeTensors;
use std::collections::HashMap;
use std::io::Write;

const DTYPES: [Dtype; 22] = [
    Dtype::BOOL,
    Dtype::F4,
    Dtype::F6_E2M3,
    Dtype::F6_E3M2,
    Dtype::U8,
    Dtype::I8,
    Dtype::F8_E5M2,
    Dtype::F8_E4M3,
    Dtype::F8_E8M0,
    Dtype::F8_E4M3FNUZ,
    Dtype::F8_E5M2FNUZ,
    Dtype::I16,
    Dtype::U16,
    Dtype::F16,
    Dtype::BF16,
    Dtype::I32,
    Dtype::U32,
    Dtype::F32,
    Dtype::C64,
    Dtype::F64,
    Dtype::I64,
    Dtype::U64,
];

type Tensor = (String, Dtype, Vec<usize>, Vec<u8>);

/// Four elements fill whole bytes in every dtype. Odd sizes come first, so that later tensors are unaligned.
fn every_dtype() -> Vec<Tensor> {
    let mut tensors = vec![("odd \"\\\u{1}é".to_string(), Dtype::U8, vec![3], vec![1, 2, 3])];
    for (i, dtype) in DTYPES.into_iter().enumerate() {
        for (name, shape) in [("matrix", vec![2, 2]), ("cube", vec![1, 4, 1]), ("empty", vec![3, 0])] {
            let len = byte_len(dtype, &shape).unwrap();
            let bytes = (0..len).map(|b| (b * 37 + i * 11 + 5) as u8).collect();
            tensors.push((format!("{dtype}.{name}"), dtype, shape, bytes));
        }
        if dtype.bitsize() >= 8 {
            let len = byte_len(dtype, &[]).unwrap();
            tensors.push((format!("{dtype}.scalar"), dtype, vec![], vec![i as u8; len]));
        }
    }
    tensors
}

fn metadata() -> BTreeMap<String, String> {
    [("ss_rank", "8"), ("a", "line\nbreak \"quoted\" é\u{1F600}"), ("empty", "")]
        .map(|(k, v)| (k.to_string(), v.to_string()))
        .into()
}

fn assert_holds(file: &File, tensors: &[Tensor]) {
    assert_eq!(file.entries().len(), tensors.len());
    for (name, dtype, shape, bytes) in tensors {
        let entry = file.get(name).unwrap_or_else(|| panic!("{name} is missing"));
        assert_eq!((entry.dtype, &entry.shape), (*dtype, shape), "{name}");
        assert_eq!(file.bytes(entry), bytes, "{name}");
    }
    assert!(file.get("no such tensor").is_none());
}

#[test]
fn the_crate_reads_what_we_write() {
    let (tensors, metadata) = (every_dtype(), metadata());
    let bytes = to_vec(&tensors, &metadata).unwrap();
    let theirs = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(theirs.len(), tensors.len());
    for (name, dtype, shape, content) in &tensors {
        let view = theirs.tensor(name).unwrap();
        assert_eq!((view.dtype(), view.shape(), view.data()), (*dtype, &shape[..], &content[..]), "{name}");
    }
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let texts: BTreeMap<_, _> = header.metadata().clone().unwrap().into_iter().collect();
    assert_eq!(texts, metadata);
}

#[test]
fn we_read_what_the_crate_writes() {
    let (tensors, metadata) = (every_dtype(), metadata());
    let views: Vec<_> = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()))
        .collect();
    let texts: HashMap<_, _> = metadata.clone().into_iter().collect();
    let file = File::from_bytes(safetensors::serialize(views, Some(texts)).unwrap()).unwrap();
    assert_holds(&file, &tensors);
    assert_eq!(file.metadata(), &metadata);
    assert_eq!(file.path(), Path::new("<memory>"));
}

#[test]
fn the_header_is_laid_out_as_promised() {
    let tensors = [("b", vec![1u8]), ("a", vec![2, 3])]
        .map(|(name, bytes)| (name.to_string(), Dtype::U8, vec![bytes.len()], bytes));
    let texts = [("z", "1"), ("k", "2")].map(|(k, v)| (k.to_string(), v.to_string()));
    let bytes = to_vec(&tensors, &texts.into()).unwrap();
    let json = concat!(
        r#"{"__metadata__":{"k":"2","z":"1"},"b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"#,
        r#""a":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}"#
    );
    let length = json.len().next_multiple_of(8);
    let mut expected = (length as u64).to_le_bytes().to_vec();
    expected.extend(format!("{json:length$}").bytes());
    expected.extend([1, 2, 3]);
    assert_eq!(String::from_utf8_lossy(&bytes), String::from_utf8_lossy(&expected));
}

#[test]
fn an_empty_file_and_a_later_versions_fields_are_legal() {
    let empty = to_vec(&[], &BTreeMap::new()).unwrap();
    assert_eq!(empty, b"\x08\0\0\0\0\0\0\0{}      ");
    let file = File::from_bytes(empty).unwrap();
    assert_eq!((file.entries().len(), file.metadata().len(), file.len()), (0, 0, 16));
    let json = r#"{"a":{"layout":{"x":[1]},"dtype":"U8","shape":[],"data_offsets":[0,1]}}"#;
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend(json.bytes());
    bytes.push(7);
    let file = File::from_bytes(bytes).unwrap();
    assert_eq!(file.bytes(&file.entries()[0]), [7]);
}

#[test]
fn entries_come_in_order_of_offset() {
    let json = concat!(
        r#"{"late":{"dtype":"U8","shape":[2],"data_offsets":[1,3]},"none":{"dtype":"F64","shape":[0],"#,
        r#""data_offsets":[1,1]},"early":{"data_offsets":[0,1],"shape":[1],"dtype":"U8"}}"#
    );
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend(json.bytes());
    bytes.extend([1, 2, 3]);
    let file = File::from_bytes(bytes).unwrap();
    let names: Vec<_> = file.entries().iter().map(|e| e.name.as_str()).collect();
    assert_eq!(names, ["early", "none", "late"]);
    assert_eq!(file.bytes(file.get("late").unwrap()), [2, 3]);
}

#[test]
fn the_writer_streams_in_any_chunks() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    let (tensors, metadata) = (every_dtype(), metadata());
    let whole = to_vec(&tensors, &metadata).unwrap();
    let layout: Vec<_> = tensors.iter().map(|(n, d, s, _)| (n.clone(), *d, s.clone())).collect();
    let data: Vec<u8> = tensors.iter().flat_map(|t| t.3.clone()).collect();
    for chunk in [1, 7, data.len()] {
        let mut writer = Writer::create(&path, &layout, &metadata).unwrap();
        data.chunks(chunk).for_each(|bytes| writer.write(bytes).unwrap());
        writer.finish().unwrap();
        assert_eq!(fs::read(&path).unwrap(), whole);
    }
    let file = File::open(&path).unwrap();
    assert_holds(&file, &tensors);
    assert_eq!((file.path(), file.len()), (path.as_path(), whole.len() as u64));
}

#[test]
fn the_writer_refuses_too_little_and_too_much() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    let layout = [("x".to_string(), Dtype::F32, vec![2])];
    let mut writer = Writer::create(&path, &layout, &BTreeMap::new()).unwrap();
    writer.write(&[1; 5]).unwrap();
    let text = writer.write(&[2; 4]).unwrap_err().to_string();
    assert!(text.contains("4 bytes to write where 3 are left"), "{text}");
    let text = writer.finish().unwrap_err().to_string();
    assert!(text.contains("3 bytes of the layout were not written"), "{text}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "nothing is left behind");

    let mut writer = Writer::create(&path, &layout, &BTreeMap::new()).unwrap();
    writer.write(&[1; 5]).unwrap();
    writer.write(&[9; 4]).unwrap_err();
    writer.write(&[2; 3]).unwrap();
    writer.finish().unwrap();
    let file = File::open(&path).unwrap();
    assert_eq!(file.bytes(&file.entries()[0]), [1, 1, 1, 1, 1, 2, 2, 2], "the refused bytes left no trace");
}

#[test]
fn what_could_not_be_read_back_is_not_written() {
    let refused = |tensors: &[(&str, Dtype, Vec<usize>, usize)]| {
        let tensors: Vec<_> =
            tensors.iter().map(|(n, d, s, len)| (n.to_string(), *d, s.clone(), vec![0; *len])).collect();
        to_vec(&tensors, &BTreeMap::new()).unwrap_err().to_string()
    };
    let one = (Dtype::U8, vec![1], 1);
    let row = |name: &'static str| (name, one.0, one.1.clone(), one.2);
    assert_eq!(refused(&[row("x"), row("x")]), "`x`: stands twice");
    assert_eq!(refused(&[row("__metadata__")]), "`__metadata__`: is no name for a tensor");
    assert_eq!(refused(&[("x", Dtype::F4, vec![3], 2)]), "`x`: F4 of shape [3] does not fill whole bytes");
    assert!(refused(&[("x", Dtype::F64, vec![1 << 40, 1 << 40], 0)]).contains("more bytes than 64 bits"));
    assert_eq!(refused(&[("x", Dtype::F32, vec![2], 7)]), "`x`: F32 of shape [2] takes 8 bytes, 7 came");
    assert_eq!(
        refused(&[("x", Dtype::U8, vec![1 << 60], 0), ("y", Dtype::U8, vec![1], 1)]),
        "`x`: U8 of shape [1152921504606846976] takes 1152921504606846976 bytes, 0 came"
    );
    let long = BTreeMap::from([("k".to_string(), "v".repeat(header::MAX_HEADER as usize))]);
    assert!(to_vec(&[], &long).unwrap_err().to_string().contains("the limit is 100000000"));
}

#[test]
fn a_file_can_be_saved_over_its_own_mapping() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    let layout = [("x".to_string(), Dtype::U8, vec![100_000])];
    let save = |value: u8| {
        let mut writer = Writer::create(&path, &layout, &BTreeMap::new()).unwrap();
        writer.write(&vec![value; 100_000]).unwrap();
        writer.finish().unwrap();
    };
    save(1);
    let old = File::open(&path).unwrap();
    save(2);
    let new = File::open(&path).unwrap();
    assert!(old.bytes(old.get("x").unwrap()).iter().all(|b| *b == 1));
    assert!(new.bytes(new.get("x").unwrap()).iter().all(|b| *b == 2));
}

#[test]
fn deep_nesting_does_not_reach_the_stack() {
    for (prefix, suffix) in [
        ("{\"a\":", ""),
        ("{\"__metadata__\":{\"k\":", ""),
        ("{\"a\":{\"shape\":", ""),
        ("{\"a\":{\"x\":", ""),
        // Well formed to the end, so that the skipped field is walked whole.
        ("{\"a\":{\"x\":", ",\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}"),
    ] {
        for (open, close) in [("[", "]"), ("{\"k\":", "}")] {
            let depth = 1_000_000;
            let mut json = prefix.to_string() + &open.repeat(depth);
            if !suffix.is_empty() {
                json += &format!("0{}{suffix}", close.repeat(depth));
            }
            let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
            bytes.extend(json.bytes());
            assert_eq!(File::from_bytes(bytes).is_ok(), !suffix.is_empty(), "{prefix}{open}…{suffix}");
        }
    }
}

#[test]
fn what_is_no_file_does_not_open() {
    let folder = tempfile::tempdir().unwrap();
    for path in [folder.path().to_owned(), folder.path().join("missing")] {
        match File::open(&path).unwrap_err() {
            Error::File { path: named, fault: FileFault::Io(_) } => assert_eq!(named, path),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn files_are_shared_between_threads() {
    fn shared<T: Clone + Send + Sync>() {}
    shared::<File>();
}

/// Streaming through a file with `release` must not grow the process: counted on the mapping itself.
#[cfg(target_os = "linux")]
#[test]
fn released_bytes_leave_memory_and_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("large.safetensors");
    // Sizes that end in the middle of pages.
    let layout: Vec<_> = (0..8).map(|i| (format!("t{i}"), Dtype::U8, vec![(2 << 20) + 1001])).collect();
    let mut writer = Writer::create(&path, &layout, &BTreeMap::new()).unwrap();
    (0..8).for_each(|i| writer.write(&vec![i + 1; (2 << 20) + 1001]).unwrap());
    writer.finish().unwrap();
    let file = File::open(&path).unwrap();
    let resident_kib = || -> u64 {
        let maps = fs::read_to_string("/proc/self/smaps").unwrap();
        let of_file = maps.lines().skip_while(|line| !line.ends_with("large.safetensors"));
        let rss = of_file.clone().find_map(|line| line.strip_prefix("Rss:")).unwrap();
        rss.trim().trim_end_matches(" kB").parse().unwrap()
    };
    let sum = |entry: &Entry| file.bytes(entry).iter().map(|b| u64::from(*b)).sum::<u64>();
    let all: Vec<u64> = file.entries().iter().map(sum).collect();
    assert!(resident_kib() > 15 << 10, "the test sees the pages: {}", resident_kib());
    file.release(0, u64::MAX);
    assert!(resident_kib() <= 64, "{}", resident_kib());
    for (entry, expected) in file.entries().iter().zip(all) {
        assert_eq!(sum(entry), expected);
        file.release(entry.begin, entry.end);
        // The kernel maps up to 64 KiB around a fault.
        assert!(resident_kib() <= 128, "{} after {}", resident_kib(), entry.name);
    }
    file.release(5, 3);
    file.release(u64::MAX, u64::MAX);
    file.clone().release(0, 100);
    File::from_bytes(fs::read(&path).unwrap()).unwrap().release(0, u64::MAX);
}

#[test]
fn a_writer_that_is_dropped_keeps_the_old_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    fs::write(&path, b"old").unwrap();
    let layout = [("x".to_string(), Dtype::U8, vec![4])];
    let mut writer = Writer::create(&path, &layout, &BTreeMap::new()).unwrap();
    writer.write(&[0; 4]).unwrap();
    drop(writer);
    assert_eq!(fs::read(&path).unwrap(), b"old");
    // A stream that is cut off on disk is told as such.
    let whole = to_vec(&[("x".into(), Dtype::U8, vec![4], vec![0; 4])], &BTreeMap::new()).unwrap();
    fs::File::create(&path).unwrap().write_all(&whole[..whole.len() - 1]).unwrap();
    let error = File::open(&path).unwrap_err();
    assert!(
        matches!(error, Error::File { fault: FileFault::PastEnd { end: 4, have: 3, .. }, .. }),
        "{error}"
    );
}

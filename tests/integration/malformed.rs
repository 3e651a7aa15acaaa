//! Files that lie. `tests/malformed` holds one small file per lie; each must be refused with its own fault, its own
//! sentence and no more memory than its size. Then a good file is damaged at random, with the `safetensors` crate as
//! the second opinion.

use crate::alloc;
use lycore::adapter::safetensors::{to_vec, File};
use lycore::dtype::{byte_len, Dtype};
use lycore::error::{Error, FileFault};
use safetensors::SafeTensors;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::{Path, PathBuf};

/// For the path, the error's text and the parser's state: none of them depends on what a file claims.
const SLACK: usize = 16 << 10;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/malformed")
}

fn fault(error: Error) -> FileFault {
    match error {
        Error::File { fault, .. } => fault,
        other => panic!("not a fault of the file: {other:?}"),
    }
}

type Matcher = fn(&FileFault) -> bool;

/// One row per file: its name and the fault that it must give.
macro_rules! answers {
    ($($name:literal => $pattern:pat $(if $guard:expr)?,)*) => {
        [$(($name, (|f| matches!(f, $pattern $(if $guard)?)) as Matcher)),*]
    };
}

fn answers() -> HashMap<&'static str, Matcher> {
    use FileFault::*;
    let rows = answers! {
        "empty_file" => TooShort { size: 0 },
        "shorter_than_the_length_field" => TooShort { size: 5 },
        "header_longer_than_file" => HeaderPastEnd { claimed: 3, size: 10 },
        "header_of_90_megabytes" => HeaderPastEnd { claimed: 90_000_000, size: 10 },
        "header_too_large" => HeaderTooLarge { claimed: 100_000_001, limit: 100_000_000 },
        "header_length_all_ones" => HeaderTooLarge { claimed: u64::MAX, .. },

        "header_not_utf8" => HeaderNotUtf8 { at: 3 },
        "header_empty" => HeaderNotJson { why } if why.contains("is empty"),
        "header_starts_with_space" => HeaderNotJson { why } if why.contains("does not start"),
        "header_is_a_list" => HeaderNotJson { why } if why.contains("`[`"),
        "header_cut_in_the_middle" => HeaderNotJson { why } if why.contains("EOF"),
        "header_without_quotes" => HeaderNotJson { why } if why.contains("key must be a string"),
        "text_after_the_header" => HeaderNotJson { why } if why.contains("trailing"),
        "lone_surrogate_in_a_name" => HeaderNotJson { why } if why.contains("hex escape"),
        "nested_lists" => HeaderNotJson { why } if why.contains("expected value"),

        "tensor_twice" => DuplicateKey { key } if key == "w",
        "tensor_twice_by_escape" => DuplicateKey { key } if key == "one",
        "metadata_twice" => DuplicateKey { key } if key == "__metadata__",
        "metadata_key_twice" => DuplicateKey { key } if key == "__metadata__.k",
        "dtype_twice" => DuplicateKey { key } if key == "w.dtype",
        "shape_twice" => DuplicateKey { key } if key == "w.shape",
        "offsets_twice" => DuplicateKey { key } if key == "w.data_offsets",
        "unknown_field_twice" => DuplicateKey { key } if key == "w.x",

        "metadata_is_a_list" => BadMetadata { why } if why.contains("sequence"),
        "metadata_is_null" => BadMetadata { why } if why.contains("null"),
        "metadata_holds_a_number" => BadMetadata { why } if why.contains("integer `8`"),
        "metadata_holds_a_map" => BadMetadata { why } if why.contains("invalid type: map"),
        "metadata_is_a_tensor" => BadMetadata { why } if why.contains("sequence"),

        "entry_is_a_list" => BadEntry { tensor, why } if tensor == "w" && why.contains("sequence"),
        "entry_is_null" => BadEntry { tensor, why } if tensor == "w" && why.contains("null"),
        "entry_without_dtype" => BadEntry { why, .. } if why.contains("missing field `dtype`"),
        "entry_without_shape" => BadEntry { why, .. } if why.contains("missing field `shape`"),
        "entry_without_offsets" => BadEntry { why, .. } if why.contains("missing field `data_offsets`"),
        "dtype_is_a_number" => BadEntry { why, .. } if why.contains("expected a string"),
        "dtype_unknown" => UnknownDtype { tensor, dtype } if tensor == "w" && dtype == "F12",
        "dtype_in_lower_case" => UnknownDtype { dtype, .. } if dtype == "u8",
        "shape_is_a_number" => BadEntry { why, .. } if why.contains("integer `4`, expected a list"),
        "shape_negative" => BadEntry { why, .. } if why.contains("`-4`"),
        "shape_fractional" => BadEntry { why, .. } if why.contains("`4.0`"),
        "shape_of_text" => BadEntry { why, .. } if why.contains("string \"4\""),
        "shape_past_64_bits" => BadEntry { why, .. } if why.contains("floating point"),
        "shape_of_65_axes" => BadEntry { why, .. } if why.contains("at most 64"),
        "offsets_only_one" => BadEntry { why, .. } if why.contains("invalid length 1"),
        "offsets_three" => BadEntry { why, .. } if why.contains("at most 2"),
        "offset_negative" => BadEntry { why, .. } if why.contains("`-1`"),
        "offset_fractional" => BadEntry { why, .. } if why.contains("`4.5`"),

        "elements_past_64_bits" => SizeOverflow { shape, .. } if shape == &[1 << 32, 1 << 32],
        "bits_past_64_bits" => SizeOverflow { shape, .. } if shape == &[1 << 60],
        "elements_2_to_the_60" => SizeMismatch { need: 0x1000_0000_0000_0000, got: 4, .. },
        "elements_and_offsets_2_to_the_60" => PastEnd { end: 0x1000_0000_0000_0000, have: 4, .. },
        "shape_larger_than_offsets" => SizeMismatch { need: 5, got: 4, .. },
        "shape_smaller_than_offsets" => SizeMismatch { need: 3, got: 4, .. },
        "scalar_without_bytes" => SizeMismatch { need: 4, got: 0, .. },
        "half_byte_left" => PartialByte { tensor } if tensor == "w",

        "offsets_reversed" => OffsetsReversed { begin: 4, end: 0, .. },
        "offset_wraps_around" => OffsetsReversed { begin: 0xffff_ffff_ffff_fffc, end: 0, .. },
        "ends_after_file" => PastEnd { tensor, end: 6, have: 4 } if tensor == "w",
        "data_cut_off" => PastEnd { tensor, end: 8, have: 7 } if tensor == "w",
        "begins_after_file" => PastEnd { end: 1000, have: 4, .. },
        "overlap_by_one_byte" => Overlap { first, second } if first == "v" && second == "w",
        "same_bytes_twice" => Overlap { first, second } if first == "left" && second == "right",
        "empty_tensor_inside_another" => Overlap { first, second } if first == "v" && second == "empty",
        "gap_before_the_first" => Gap { tensor, bytes: 1 } if tensor == "w",
        "gap_between_two" => Gap { tensor, bytes: 2 } if tensor == "w",
        "trailing_byte" => TrailingBytes { bytes: 1 },
        "bytes_without_tensors" => TrailingBytes { bytes: 3 },
    };
    let count = rows.len();
    let map = HashMap::from(rows);
    assert_eq!(map.len(), count, "a row stands twice");
    map
}

/// The files of the folder, by name without extension. Anything else but the script that made them is a stray.
fn files() -> BTreeMap<String, PathBuf> {
    let mut files = BTreeMap::new();
    for path in fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().path()) {
        match path.extension().and_then(|e| e.to_str()) {
            Some("safetensors") => {
                files.insert(path.file_stem().unwrap().to_str().unwrap().to_owned(), path);
            }
            _ => assert!(path.ends_with("make.py") || path.ends_with("__pycache__"), "stray {path:?}"),
        }
    }
    files
}

#[test]
fn every_lie_has_its_own_fault() {
    let (answers, files) = (answers(), files());
    let mut texts = BTreeMap::new();
    for (name, path) in &files {
        let matcher = answers.get(name.as_str()).unwrap_or_else(|| panic!("{name}: no answer in the table"));
        let error = File::open(path).expect_err(name);
        assert_eq!(error.file(), Some(path.as_path()));
        assert!(error.hint().contains("damaged"), "{name}: {:?}", error.hint());
        let mapped = fault(error);
        assert!(matcher(&mapped), "{name}: {mapped:?}");
        let loaded = fault(File::from_bytes(fs::read(path).unwrap()).expect_err(name));
        assert!(matcher(&loaded), "{name} from memory: {loaded:?}");
        if let Some(other) = texts.insert(mapped.to_string(), name) {
            panic!("{name} and {other} give the same text: {mapped}");
        }
    }
    let missing: Vec<_> = answers.keys().filter(|name| !files.contains_key(**name)).collect();
    assert!(missing.is_empty(), "no file for {missing:?}");
}

/// Every fault that reading can give has a file: a new one in `error.rs` needs a lie here.
#[test]
fn every_fault_has_a_lie() {
    let variant = |f: &FileFault| format!("{f:?}").split([' ', '(']).next().unwrap().to_owned();
    let seen: BTreeSet<_> =
        files().values().map(|path| variant(&fault(File::open(path).unwrap_err()))).collect();
    let all = [
        "BadEntry",
        "BadMetadata",
        "DuplicateKey",
        "Gap",
        "HeaderNotJson",
        "HeaderNotUtf8",
        "HeaderPastEnd",
        "HeaderTooLarge",
        "OffsetsReversed",
        "Overlap",
        "PartialByte",
        "PastEnd",
        "SizeMismatch",
        "SizeOverflow",
        "TooShort",
        "TrailingBytes",
        "UnknownDtype",
    ];
    assert_eq!(seen, all.map(str::to_owned).into());
}

#[test]
fn a_lie_costs_no_memory() {
    for (name, path) in files() {
        let size = fs::metadata(&path).unwrap().len() as usize;
        let (result, peak) = alloc::peak(|| File::open(&path));
        assert!(result.is_err());
        assert!(peak <= size + SLACK, "{name}: {peak} bytes for a file of {size}");
    }
}

/// A real header of a size that matters, then lies of the same size: memory goes with the bytes that are there.
#[test]
fn memory_goes_with_the_header_that_is_there() {
    let header = |text: String| {
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend(text.into_bytes());
        bytes
    };
    let n = 1 << 20;
    for (what, bytes) in [
        ("one name", header(format!("{{\"{}\":1}}", "x".repeat(n)))),
        ("axes", header(format!(r#"{{"a":{{"shape":[{}1]}}}}"#, "1,".repeat(n / 2)))),
        ("offsets", header(format!(r#"{{"a":{{"data_offsets":[{}1]}}}}"#, "1,".repeat(n / 2)))),
        ("nesting", header(format!(r#"{{"a":{{"x":{}"#, "[".repeat(n)))),
        ("spaces", header(format!("{{{}", " ".repeat(n)))),
    ] {
        let size = bytes.len();
        let (result, peak) = alloc::peak(|| File::from_bytes(bytes));
        assert!(result.is_err(), "{what}");
        // The copy of the header, its longest name as a key and in the parser's buffer, and in the fault.
        assert!(peak <= 5 * size, "{what}: {peak} bytes for a file of {size}");
    }
}

/// SplitMix64: enough for tests, equal on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

fn good_file() -> Vec<u8> {
    let tensors = [
        ("lora_unet_a.lora_up.weight", Dtype::F16, vec![4, 2]),
        ("lora_unet_a.lora_down.weight", Dtype::BF16, vec![2, 3]),
        ("lora_unet_a.alpha", Dtype::F32, vec![]),
        ("odd", Dtype::U8, vec![3]),
        ("none", Dtype::I64, vec![0, 7]),
        ("half bytes", Dtype::F4, vec![2, 5]),
    ]
    .map(|(name, dtype, shape)| {
        let bytes = vec![0x5a; byte_len(dtype, &shape).unwrap()];
        (name.to_owned(), dtype, shape, bytes)
    });
    let metadata = [("ss_network_dim", "2"), ("ss_tag", "\"x\"")].map(|(k, v)| (k.to_owned(), v.to_owned()));
    to_vec(&tensors, &metadata.into()).unwrap()
}

/// Damages a copy: bytes flipped or replaced by ones that mean something in JSON, pieces moved, the end cut or grown.
fn damaged(good: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = good.to_vec();
    let header = 8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    for _ in 0..1 + random.below(3) {
        if bytes.is_empty() {
            break;
        }
        // Most of the rules are about the header.
        let within = if random.below(4) > 0 { header.min(bytes.len()) } else { bytes.len() };
        let at = random.below(within);
        match random.below(8) {
            0..=2 => bytes[at] ^= 1 << random.below(8),
            3..=4 => bytes[at] = b"0123456789{}[]\",:-. eE\\"[random.below(23)],
            5 => bytes.truncate(random.below(bytes.len() + 1)),
            6 => bytes.extend_from_slice(&random.next().to_le_bytes()[..random.below(9)]),
            _ => {
                let len = random.below(60).min(bytes.len() - at);
                let to = random.below(bytes.len() - len + 1);
                bytes.copy_within(at..at + len, to);
            }
        }
    }
    bytes
}

#[test]
fn a_damaged_file_never_panics_and_never_lies() {
    let good = good_file();
    assert_eq!(File::from_bytes(good.clone()).unwrap().entries().len(), 6);
    let mut random = Random(20_240_817);
    let (mut accepted, mut refused) = (0, BTreeMap::<String, usize>::new());
    for case in 0..10_000 {
        let bytes = damaged(&good, &mut random);
        let result = catch_unwind(AssertUnwindSafe(|| File::from_bytes(bytes.clone())))
            .unwrap_or_else(|_| panic!("case {case} panicked: {bytes:?}"));
        let theirs = SafeTensors::deserialize(&bytes);
        match result {
            Ok(file) => {
                accepted += 1;
                let theirs =
                    theirs.unwrap_or_else(|e| panic!("case {case}: only we accept it ({e}): {bytes:?}"));
                assert_eq!(theirs.len(), file.entries().len(), "case {case}");
                let mut end = 0;
                for entry in file.entries() {
                    assert_eq!(entry.begin, end, "case {case}");
                    end = entry.end;
                    assert_eq!(Some(file.bytes(entry).len()), byte_len(entry.dtype, &entry.shape));
                    let view = theirs.tensor(&entry.name).unwrap();
                    assert_eq!((view.dtype(), view.shape()), (entry.dtype, &entry.shape[..]), "case {case}");
                    assert_eq!(view.data(), file.bytes(entry), "case {case}");
                    assert_eq!(file.get(&entry.name), Some(entry));
                }
                let data = u64::from_le_bytes(bytes[..8].try_into().unwrap()) + 8;
                assert_eq!(data + end, file.len(), "case {case}");
            }
            Err(error) => {
                assert!(!error.to_string().is_empty());
                let fault = fault(error);
                // Where we are stricter than the crate: names that stand twice, and what stands before `{`.
                let stricter = match &fault {
                    FileFault::DuplicateKey { .. } => true,
                    FileFault::HeaderNotJson { why } => why.contains("start with"),
                    _ => false,
                };
                assert!(stricter || theirs.is_err(), "case {case}: only we refuse it: {fault}");
                let variant = format!("{fault:?}").split([' ', '(']).next().unwrap().to_owned();
                *refused.entry(variant).or_default() += 1;
            }
        }
    }
    // The damage reaches deep enough to mean something.
    assert!(accepted > 500 && refused.len() >= 12, "{accepted} accepted, refused: {refused:?}");
}

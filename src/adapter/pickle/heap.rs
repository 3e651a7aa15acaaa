//! What a pickle makes: values, and the heap that they point into.
//!
//! Values are numbers and indices, the heap only grows: a container that holds itself is harmless, and to drop a deeply
//! nested one does not recurse.

use crate::dtype::Dtype;

/// What stands on the stack. Containers, text and tensors are indices into the [`Heap`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Value {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(usize),
    List(usize),
    /// Lies beside the lists on the heap, but never grows.
    Tuple(usize),
    Dict(usize),
    Global(Global),
    Storage(usize),
    Tensor(usize),
    /// Bytes, or an integer past 64 bits: allowed, of no use.
    Other,
}

/// The only names that a file may ask for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Global {
    OrderedDict,
    Size,
    /// `_rebuild_tensor_v2`: the elements are of the storage's type.
    Tensor,
    /// `_rebuild_tensor_v3`: the type comes with the call, the storage is bytes.
    TypedTensor,
    Parameter,
    Storage(Dtype),
    Dtype(Dtype),
}

/// Each type's storage class (before fp8 every type had one) and its name in `torch`.
const TYPES: [(&str, &str, Dtype); 18] = [
    ("FloatStorage", "float32", Dtype::F32),
    ("HalfStorage", "float16", Dtype::F16),
    ("BFloat16Storage", "bfloat16", Dtype::BF16),
    ("DoubleStorage", "float64", Dtype::F64),
    ("LongStorage", "int64", Dtype::I64),
    ("IntStorage", "int32", Dtype::I32),
    ("ShortStorage", "int16", Dtype::I16),
    ("CharStorage", "int8", Dtype::I8),
    ("ByteStorage", "uint8", Dtype::U8),
    ("BoolStorage", "bool", Dtype::BOOL),
    ("", "float8_e4m3fn", Dtype::F8_E4M3),
    ("", "float8_e4m3fnuz", Dtype::F8_E4M3FNUZ),
    ("", "float8_e5m2", Dtype::F8_E5M2),
    ("", "float8_e5m2fnuz", Dtype::F8_E5M2FNUZ),
    ("", "float8_e8m0fnu", Dtype::F8_E8M0),
    ("", "uint16", Dtype::U16),
    ("", "uint32", Dtype::U32),
    ("", "uint64", Dtype::U64),
];

impl Global {
    /// The meaning of a name; `None` for all that are refused.
    pub fn find(module: &str, name: &str) -> Option<Self> {
        match (module, name) {
            ("collections", "OrderedDict") => Some(Global::OrderedDict),
            ("torch", "Size") => Some(Global::Size),
            ("torch._utils", "_rebuild_tensor_v2") => Some(Global::Tensor),
            ("torch._utils", "_rebuild_tensor_v3") => Some(Global::TypedTensor),
            ("torch._utils", "_rebuild_parameter") => Some(Global::Parameter),
            ("torch.storage", "UntypedStorage") => Some(Global::Storage(Dtype::U8)),
            ("torch", name) if !name.is_empty() => {
                TYPES.iter().find_map(|&(storage, dtype, is)| match name {
                    _ if name == storage => Some(Global::Storage(is)),
                    _ if name == dtype => Some(Global::Dtype(is)),
                    _ => None,
                })
            }
            _ => None,
        }
    }
}

/// Elements that lie somewhere else in the file, under a key.
#[derive(Clone, Copy, Debug)]
pub(super) struct Storage {
    /// A text on the heap: a file may mention one storage as often as it likes.
    pub key: Value,
    pub dtype: Dtype,
    pub count: usize,
}

/// What a file says about one tensor; nothing of it is proven.
#[derive(Clone, Copy, Debug)]
pub(super) struct Spec {
    pub storage: usize,
    pub dtype: Dtype,
    /// First element, counted in elements from the start of the storage.
    pub offset: Value,
    /// Tuples of integers, if the file is honest.
    pub shape: Value,
    pub strides: Value,
}

/// Everything that a pickle made.
#[derive(Debug, Default)]
pub(super) struct Heap {
    texts: Vec<String>,
    lists: Vec<Vec<Value>>,
    dicts: Vec<Vec<(Value, Value)>>,
    /// Every mention of a storage, also of one that was mentioned before.
    pub storages: Vec<Storage>,
    tensors: Vec<Spec>,
}

impl Heap {
    pub fn text(&self, value: Value) -> Option<&str> {
        let Value::Text(i) = value else { return None };
        self.texts.get(i).map(String::as_str)
    }

    /// The items of a list or tuple.
    pub fn items(&self, value: Value) -> Option<&[Value]> {
        let (Value::List(i) | Value::Tuple(i)) = value else { return None };
        self.lists.get(i).map(Vec::as_slice)
    }

    /// The pairs of a dict, in the order of the file; a key may stand twice.
    pub fn pairs(&self, value: Value) -> Option<&[(Value, Value)]> {
        let Value::Dict(i) = value else { return None };
        self.dicts.get(i).map(Vec::as_slice)
    }

    /// The last value under this key.
    pub fn get(&self, dict: Value, key: &str) -> Option<Value> {
        self.pairs(dict)?.iter().rev().find(|&&(k, _)| self.text(k) == Some(key)).map(|&(_, value)| value)
    }

    pub fn tensor(&self, value: Value) -> Option<Spec> {
        let Value::Tensor(i) = value else { return None };
        self.tensors.get(i).copied()
    }

    pub fn add_text(&mut self, text: String) -> Value {
        self.texts.push(text);
        Value::Text(self.texts.len() - 1)
    }

    pub fn add_list(&mut self, items: Vec<Value>) -> Value {
        self.lists.push(items);
        Value::List(self.lists.len() - 1)
    }

    pub fn add_tuple(&mut self, items: Vec<Value>) -> Value {
        self.lists.push(items);
        Value::Tuple(self.lists.len() - 1)
    }

    pub fn add_dict(&mut self) -> Value {
        self.dicts.push(Vec::new());
        Value::Dict(self.dicts.len() - 1)
    }

    pub fn add_storage(&mut self, storage: Storage) -> Value {
        self.storages.push(storage);
        Value::Storage(self.storages.len() - 1)
    }

    pub fn add_tensor(&mut self, spec: Spec) -> Value {
        self.tensors.push(spec);
        Value::Tensor(self.tensors.len() - 1)
    }

    /// The items of a list, to add to.
    pub fn grow_list(&mut self, value: Value) -> Option<&mut Vec<Value>> {
        let Value::List(i) = value else { return None };
        self.lists.get_mut(i)
    }

    /// The pairs of a dict, to add to.
    pub fn grow_dict(&mut self, value: Value) -> Option<&mut Vec<(Value, Value)>> {
        let Value::Dict(i) = value else { return None };
        self.dicts.get_mut(i)
    }
}

//! A pickle machine that cannot run anything.
//!
//! Pickle is a program for a stack machine. This one knows the opcodes that Python writes for containers, numbers and
//! text, and a closed list of names ([`Global`]) whose "calls" only note down what a tensor is. Nothing recurses, and
//! time and memory are bounded by the number of opcodes.

use super::heap::{Global, Heap, Spec, Storage, Value};
use super::{bad, Fault};
use crate::error::FileFault;
use std::collections::HashMap;

/// More opcodes than any adapter needs: a tensor takes about 45. It bounds time, stack, heap and memo.
const MAX_OPCODES: usize = 1 << 20;

/// A pickle that has run.
pub(super) struct Loaded {
    pub heap: Heap,
    /// What it left.
    pub top: Value,
    /// Offset of the first byte after it.
    pub end: usize,
}

/// Runs the pickle that starts at `start`.
pub(super) fn load(bytes: &[u8], start: usize) -> Fault<Loaded> {
    let mut machine = Machine {
        bytes,
        at: start,
        op_at: start,
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
        heap: Heap::default(),
    };
    for _ in 0..MAX_OPCODES {
        if let Some(top) = machine.step()? {
            return Ok(Loaded { heap: machine.heap, top, end: machine.at });
        }
    }
    bad(format!("the pickle has more than {MAX_OPCODES} opcodes"))
}

struct Machine<'a> {
    bytes: &'a [u8],
    /// Next byte.
    at: usize,
    /// Where the opcode that runs now stands.
    op_at: usize,
    stack: Vec<Value>,
    /// Heights of the stack where a container's items begin.
    marks: Vec<usize>,
    memo: HashMap<u32, Value>,
    heap: Heap,
}

impl<'a> Machine<'a> {
    /// Runs one opcode; the result, if it was the last.
    fn step(&mut self) -> Fault<Option<Value>> {
        self.op_at = self.at;
        let [op] = self.take()?;
        let value = match op {
            // PROTO, FRAME: what follows says it all.
            0x80 => {
                let [version] = self.take()?;
                return match version {
                    2..=5 => Ok(None),
                    _ => self.wrong(format!("pickle protocol {version} is not one of 2 to 5")),
                };
            }
            0x95 => return self.take::<8>().map(|_| None),
            b'.' if self.marks.is_empty() => return self.pop().map(Some),
            b'(' => {
                self.marks.push(self.stack.len());
                return Ok(None);
            }
            b'N' => Value::None,
            0x88 => Value::Bool(true),
            0x89 => Value::Bool(false),
            b'K' => Value::Int(self.take::<1>().map(|b| b[0].into())?),
            b'M' => Value::Int(u16::from_le_bytes(self.take()?).into()),
            b'J' => Value::Int(i32::from_le_bytes(self.take()?).into()),
            0x8a => {
                let [len] = self.take()?;
                long(self.slice(len.into())?)
            }
            b'G' => Value::Float(f64::from_be_bytes(self.take()?)),
            // Text of Python 3 and, where it is UTF-8, of Python 2.
            b'X' | b'T' => self.long_text()?,
            0x8c | b'U' => {
                let [len] = self.take()?;
                self.text(len.into())?
            }
            b'B' => {
                let len = self.length()?;
                self.slice(len).map(|_| Value::Other)?
            }
            b'C' => {
                let [len] = self.take()?;
                self.slice(len.into()).map(|_| Value::Other)?
            }
            b']' => self.heap.add_list(Vec::new()),
            b')' => self.heap.add_tuple(Vec::new()),
            b'}' => self.heap.add_dict(),
            b't' => {
                let items = self.since_mark()?;
                self.heap.add_tuple(items)
            }
            0x85..=0x87 => {
                let mut items = Vec::with_capacity(3);
                for _ in 0x85..=op {
                    items.push(self.pop()?);
                }
                items.reverse();
                self.heap.add_tuple(items)
            }
            b'a' => {
                let item = self.pop()?;
                return self.append(vec![item]);
            }
            b'e' => {
                let items = self.since_mark()?;
                return self.append(items);
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                return self.set(&[key, value]);
            }
            b'u' => {
                let items = self.since_mark()?;
                return self.set(&items);
            }
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.global(&module, &name)?
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (Some(module), Some(name)) = (self.heap.text(module), self.heap.text(name)) else {
                    return self.wrong("a global without a name");
                };
                self.global(module, name)?
            }
            b'R' => {
                let (args, function) = (self.pop()?, self.pop()?);
                self.call(function, args)?
            }
            // BUILD sets attributes. A state dict carries `_metadata`, the versions of its layers.
            b'b' => {
                let (_, object) = (self.pop()?, self.pop()?);
                match object {
                    Value::Dict(_) => object,
                    _ => return self.wrong("attributes on something else than a dict"),
                }
            }
            b'Q' => {
                let id = self.pop()?;
                self.storage(id)?
            }
            b'h' => {
                let [key] = self.take()?;
                self.recall(key.into())?
            }
            b'j' => {
                let key = u32::from_le_bytes(self.take()?);
                self.recall(key)?
            }
            b'q' => {
                let [key] = self.take()?;
                return self.remember(key.into());
            }
            b'r' => {
                let key = u32::from_le_bytes(self.take()?);
                return self.remember(key);
            }
            0x94 => return self.remember(u32::try_from(self.memo.len()).unwrap_or(u32::MAX)),
            _ => return self.wrong("this opcode has no place in a file of tensors"),
        };
        self.stack.push(value);
        Ok(None)
    }

    /// An error that says where.
    fn wrong<T>(&self, why: impl Into<String>) -> Fault<T> {
        let (why, at) = (why.into(), self.op_at);
        match self.bytes.get(at) {
            Some(op) => bad(format!("{why} (opcode 0x{op:02x} at byte {at} of the pickle)")),
            None => bad(format!("the pickle is cut off at byte {at}")),
        }
    }

    fn slice(&mut self, len: usize) -> Fault<&'a [u8]> {
        match self.bytes.get(self.at..).and_then(|rest| rest.get(..len)) {
            Some(bytes) => {
                self.at += len;
                Ok(bytes)
            }
            None => self.wrong("the pickle is cut off"),
        }
    }

    fn take<const N: usize>(&mut self) -> Fault<[u8; N]> {
        match self.slice(N)?.first_chunk() {
            Some(bytes) => Ok(*bytes),
            None => self.wrong("the pickle is cut off"),
        }
    }

    fn length(&mut self) -> Fault<usize> {
        Ok(u32::from_le_bytes(self.take()?) as usize)
    }

    fn long_text(&mut self) -> Fault<Value> {
        let len = self.length()?;
        self.text(len)
    }

    fn text(&mut self, len: usize) -> Fault<Value> {
        // Copied before it is checked: the bytes of a mapped file can change in between.
        match String::from_utf8(self.slice(len)?.to_vec()) {
            Ok(text) => Ok(self.heap.add_text(text)),
            Err(_) => self.wrong("text that is not UTF-8"),
        }
    }

    fn line(&mut self) -> Fault<String> {
        let Some(len) = self.bytes.get(self.at..).and_then(|rest| rest.iter().position(|&b| b == b'\n'))
        else {
            return self.wrong("the pickle is cut off");
        };
        let line = String::from_utf8_lossy(self.slice(len)?).into_owned();
        self.take::<1>()?;
        Ok(line)
    }

    fn pop(&mut self) -> Fault<Value> {
        // Never below the innermost mark: its items belong to a container that is not closed yet.
        if self.stack.len() > self.marks.last().copied().unwrap_or(0) {
            if let Some(value) = self.stack.pop() {
                return Ok(value);
            }
        }
        self.wrong("takes a value from an empty stack")
    }

    /// The value on top, which stays.
    fn top(&self) -> Fault<Value> {
        match self.stack.last() {
            Some(&value) if self.stack.len() > self.marks.last().copied().unwrap_or(0) => Ok(value),
            _ => self.wrong("needs a value on an empty stack"),
        }
    }

    fn since_mark(&mut self) -> Fault<Vec<Value>> {
        match self.marks.pop() {
            Some(mark) if mark <= self.stack.len() => Ok(self.stack.split_off(mark)),
            _ => self.wrong("closes a container that was never opened"),
        }
    }

    fn remember(&mut self, key: u32) -> Fault<Option<Value>> {
        let value = self.top()?;
        self.memo.insert(key, value);
        Ok(None)
    }

    fn recall(&self, key: u32) -> Fault<Value> {
        match self.memo.get(&key) {
            Some(&value) => Ok(value),
            None => self.wrong(format!("recalls memo {key}, which was never set")),
        }
    }

    fn append(&mut self, items: Vec<Value>) -> Fault<Option<Value>> {
        let top = self.top()?;
        let Some(list) = self.heap.grow_list(top) else {
            return self.wrong("appends to something else than a list");
        };
        list.extend(items);
        Ok(None)
    }

    fn set(&mut self, items: &[Value]) -> Fault<Option<Value>> {
        if items.len() % 2 != 0 {
            return self.wrong("sets a key without a value");
        }
        let top = self.top()?;
        let Some(dict) = self.heap.grow_dict(top) else {
            return self.wrong("sets keys on something else than a dict");
        };
        dict.extend(items.chunks_exact(2).filter_map(|pair| Some((*pair.first()?, *pair.get(1)?))));
        Ok(None)
    }

    fn global(&self, module: &str, name: &str) -> Fault<Value> {
        Global::find(module, name).map(Value::Global).ok_or_else(|| {
            // The name is the file's word: made printable, and no longer than a line.
            let global = format!("{module}.{name}").escape_debug().take(100).collect();
            FileFault::PickledCode { global, at: self.op_at }
        })
    }

    /// What a "call" of one of the allowed names gives.
    fn call(&mut self, function: Value, args: Value) -> Fault<Value> {
        let (Value::Global(function), Some(args)) = (function, self.heap.items(args)) else {
            return self.wrong("calls something that is no function");
        };
        match (function, args) {
            (Global::OrderedDict, []) => Ok(self.heap.add_dict()),
            (Global::Size, &[shape @ Value::Tuple(_)]) => Ok(shape),
            (Global::Parameter, &[tensor @ Value::Tensor(_), ..]) => Ok(tensor),
            // After the strides: whether it needs a gradient, and hooks; neither matters to a file.
            (Global::Tensor, &[Value::Storage(storage), offset, shape, strides, _, _]) => {
                let Some(dtype) = self.heap.storages.get(storage).map(|s| s.dtype) else {
                    return self.wrong("a tensor without a storage");
                };
                Ok(self.heap.add_tensor(Spec { storage, dtype, offset, shape, strides }))
            }
            (
                Global::TypedTensor,
                &[Value::Storage(storage), offset, shape, strides, _, _, Value::Global(Global::Dtype(dtype))],
            ) => Ok(self.heap.add_tensor(Spec { storage, dtype, offset, shape, strides })),
            _ => self.wrong(format!("makes a {function:?} from arguments that this reader does not take")),
        }
    }

    /// A persistent id: `("storage", class, key, device, elements)`. The old format adds a view, which torch leaves None.
    fn storage(&mut self, id: Value) -> Fault<Value> {
        let (tag, class, key, count) = match self.heap.items(id) {
            Some(&[tag, class, key, _, count] | &[tag, class, key, _, count, Value::None]) => {
                (self.heap.text(tag), class, key, count)
            }
            _ => (None, Value::None, Value::None, Value::None),
        };
        match (tag, class, key, count) {
            (Some("storage"), Value::Global(Global::Storage(dtype)), Value::Text(_), Value::Int(count))
                if count >= 0 =>
            {
                let count = usize::try_from(count).unwrap_or(usize::MAX);
                Ok(self.heap.add_storage(Storage { key, dtype, count }))
            }
            _ => self.wrong("a reference that is no storage of a known type"),
        }
    }
}

/// A little-endian integer in two's complement of any length.
fn long(bytes: &[u8]) -> Value {
    let mut wide = match bytes.last() {
        Some(&last) if last >= 0x80 => [0xff; 8],
        _ => [0; 8],
    };
    match wide.get_mut(..bytes.len()) {
        Some(low) => {
            low.copy_from_slice(bytes);
            Value::Int(i64::from_le_bytes(wide))
        }
        None => Value::Other,
    }
}

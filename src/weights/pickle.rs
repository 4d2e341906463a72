//! Reads the one pickle shape that `torch.save` of a state dict produces, without executing anything: an
//! interpreter of the opcodes involved, whose only callables are an enumeration of four names.
//!
//! Values are `Copy` and refer to arenas (strings to the input itself), so a hostile pickle can build neither
//! deep recursion nor more memory than a constant times its own length. What is copied out of the arenas can be named
//! again and again in a few bytes each time, and has limits of its own.

use std::collections::HashMap;

/// Tensors of a file. The released 14B model has 1,200; each is some 1.5 KB here at the most.
const MAX_TENSORS: usize = 1 << 16;
/// As in torch.
const MAX_DIMENSIONS: usize = 64;
/// Bytes of a tensor's name, a storage's class and its key.
const MAX_NAME: usize = 1024;
const MAX_CLASS: usize = 64;
const MAX_KEY: usize = 256;

/// A pickled tensor: a strided window onto a storage record. Elements, not bytes.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct PickledTensor {
    /// Class name of the storage: `FloatStorage`, `BFloat16Storage`, ...
    pub(super) storage_class: String,
    /// Record key: the archive's file `data/KEY`.
    pub(super) key: String,
    pub(super) storage_elements: u64,
    pub(super) offset: u64,
    pub(super) shape: Vec<u64>,
    pub(super) stride: Vec<u64>,
}

/// Reads a flat dictionary from tensor names to tensors, in the order of insertion.
pub(super) fn read_state_dict(pickle: &[u8]) -> Result<Vec<(String, PickledTensor)>, String> {
    let mut machine = Machine { input: pickle, ..Machine::default() };
    let top = machine.run().map_err(|reason| format!("pickle, byte {}: {reason}", machine.at))?;
    let Value::Dict(dict) = top else {
        return Err(format!("the pickle holds {}, not a dictionary of tensors", machine.kind(top)));
    };
    let pairs = &machine.dicts[dict];
    within("entries of the dictionary", pairs.len(), MAX_TENSORS)?;
    let mut tensors = Vec::with_capacity(pairs.len());
    for &(key, value) in pairs {
        let Value::Str(name) = key else {
            return Err(format!("a key of the dictionary is {}, not a string", machine.kind(key)));
        };
        let name = machine.text(name);
        within("bytes of a tensor's name", name.len(), MAX_NAME)?;
        let Value::Tensor(tensor) = value else {
            return Err(format!("entry {} is {}, not a tensor", super::escape(name), machine.kind(value)));
        };
        tensors.push((name.to_owned(), machine.tensors[tensor].clone()));
    }
    Ok(tensors)
}

/// An error that has the number in it, if `count` is more than `most`.
fn within(what: &str, count: usize, most: usize) -> Step<()> {
    if count > most { Err(format!("{count} {what}, at most {most} are read")) } else { Ok(()) }
}

#[derive(Clone, Copy)]
enum Value {
    Mark,
    None,
    Bool,
    Int(i64),
    /// A float or a list: met only in metadata, which is skipped.
    Other,
    Str(Span),
    Tuple(usize),
    Dict(usize),
    Global(Global),
    Storage(usize),
    Tensor(usize),
}

/// A range of the pickle's own bytes, known to be UTF-8.
#[derive(Clone, Copy)]
struct Span {
    start: usize,
    end: usize,
}

/// The only names a pickle may import.
#[derive(Clone, Copy)]
enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    /// `torch.*Storage`; the span is the class name.
    Storage(Span),
}

struct Storage {
    class: Span,
    key: Span,
    elements: u64,
}

#[derive(Default)]
struct Machine<'a> {
    input: &'a [u8],
    at: usize,
    stack: Vec<Value>,
    memo: HashMap<u32, Value>,
    tuples: Vec<Vec<Value>>,
    dicts: Vec<Vec<(Value, Value)>>,
    storages: Vec<Storage>,
    tensors: Vec<PickledTensor>,
}

type Step<T> = std::result::Result<T, String>;

impl Machine<'_> {
    fn run(&mut self) -> Step<Value> {
        loop {
            let opcode = self.byte()?;
            if opcode == b'.' {
                let top = self.pop()?;
                return if self.stack.is_empty() {
                    Ok(top)
                } else {
                    Err("values are left on the stack".into())
                };
            }
            self.step(opcode)?;
        }
    }

    fn step(&mut self, opcode: u8) -> Step<()> {
        match opcode {
            // PROTO, FRAME: nothing follows from them that the opcodes do not say.
            0x80 => drop(self.take(1)?),
            0x95 => drop(self.take(8)?),
            b'(' => self.stack.push(Value::Mark),
            b'N' => self.stack.push(Value::None),
            0x88 | 0x89 => self.stack.push(Value::Bool),
            b'J' => {
                let value = i32::from_le_bytes(self.array()?);
                self.stack.push(Value::Int(value.into()));
            }
            b'K' => {
                let value = self.byte()?;
                self.stack.push(Value::Int(value.into()));
            }
            b'M' => {
                let value = u16::from_le_bytes(self.array()?);
                self.stack.push(Value::Int(value.into()));
            }
            0x8a => self.long()?,
            b'G' => {
                self.take(8)?;
                self.stack.push(Value::Other);
            }
            b'X' => {
                let length = u32::from_le_bytes(self.array()?);
                self.string(length as usize)?;
            }
            0x8c => {
                let length = self.byte()?;
                self.string(length.into())?;
            }
            b')' => self.new_tuple(Vec::new()),
            b't' => {
                let items = self.pop_to_mark()?;
                self.new_tuple(items);
            }
            0x85..=0x87 => {
                let count = usize::from(opcode - 0x84);
                let start =
                    self.stack.len().checked_sub(count).ok_or("the stack is too short for a tuple")?;
                let items = self.stack.split_off(start);
                self.new_tuple(items);
            }
            b'}' => self.new_dict(),
            b']' => self.stack.push(Value::Other),
            b'a' => drop(self.pop()?),
            b'e' => drop(self.pop_to_mark()?),
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.set_items(&[key, value])?;
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.set_items(&items)?;
            }
            b'q' => {
                let slot = self.byte()?;
                self.put(slot.into())?;
            }
            b'r' => {
                let slot = u32::from_le_bytes(self.array()?);
                self.put(slot)?;
            }
            0x94 => {
                let slot = u32::try_from(self.memo.len()).map_err(|_| "the memo is full")?;
                self.put(slot)?;
            }
            b'h' => {
                let slot = self.byte()?;
                self.get(slot.into())?;
            }
            b'j' => {
                let slot = u32::from_le_bytes(self.array()?);
                self.get(slot)?;
            }
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.import(module, name)?;
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (Value::Str(module), Value::Str(name)) = (module, name) else {
                    return Err("an import whose names are not strings".into());
                };
                self.import(module, name)?;
            }
            b'Q' => self.persistent_id()?,
            b'R' => self.reduce()?,
            // BUILD sets attributes. State dicts carry `_metadata` (module versions), which says nothing of tensors.
            b'b' => match (self.pop()?, self.stack.last()) {
                (Value::Dict(_), Some(Value::Dict(_))) => {}
                _ => return Err("attributes are set on something other than a dictionary".into()),
            },
            _ => return Err(format!("opcode {opcode:#04x} has no place in a file of tensors")),
        }
        Ok(())
    }

    fn take(&mut self, count: usize) -> Step<Span> {
        let end = self.at.checked_add(count).filter(|&end| end <= self.input.len());
        let span = Span { start: self.at, end: end.ok_or("the pickle ends early")? };
        self.at = span.end;
        Ok(span)
    }

    fn byte(&mut self) -> Step<u8> {
        let [byte] = self.array()?;
        Ok(byte)
    }

    fn array<const N: usize>(&mut self) -> Step<[u8; N]> {
        let span = self.take(N)?;
        self.input[span.start..span.end].try_into().map_err(|_| "the pickle ends early".into())
    }

    fn checked_text(&self, span: Span) -> Step<Span> {
        std::str::from_utf8(&self.input[span.start..span.end]).map_err(|_| "a string is not UTF-8")?;
        Ok(span)
    }

    fn text(&self, span: Span) -> &str {
        // Spans are made by `checked_text` only; the fallback is never taken.
        std::str::from_utf8(&self.input[span.start..span.end]).unwrap_or_default()
    }

    fn string(&mut self, length: usize) -> Step<()> {
        let span = self.take(length)?;
        let span = self.checked_text(span)?;
        self.stack.push(Value::Str(span));
        Ok(())
    }

    /// LONG1: a little-endian two's complement number of any length; storages of 2^31 elements need it.
    fn long(&mut self) -> Step<()> {
        let count = usize::from(self.byte()?);
        let span = self.take(count)?;
        let bytes = &self.input[span.start..span.end];
        if bytes.len() > 8 {
            return Err(format!("an integer of {} bytes", bytes.len()));
        }
        let negative = bytes.last().is_some_and(|last| last & 0x80 != 0);
        let mut wide = [if negative { 0xff } else { 0 }; 8];
        wide[..bytes.len()].copy_from_slice(bytes);
        self.stack.push(Value::Int(i64::from_le_bytes(wide)));
        Ok(())
    }

    fn line(&mut self) -> Step<Span> {
        let rest = &self.input[self.at..];
        let length = rest.iter().position(|&byte| byte == b'\n').ok_or("the pickle ends inside a name")?;
        let span = self.take(length)?;
        self.at += 1;
        self.checked_text(span)
    }

    fn pop(&mut self) -> Step<Value> {
        match self.stack.pop() {
            Some(Value::Mark) | None => Err("the stack is empty".into()),
            Some(value) => Ok(value),
        }
    }

    fn pop_to_mark(&mut self) -> Step<Vec<Value>> {
        let mark =
            self.stack.iter().rposition(|value| matches!(value, Value::Mark)).ok_or("a mark is missing")?;
        let items = self.stack.split_off(mark + 1);
        self.stack.pop();
        Ok(items)
    }

    fn new_tuple(&mut self, items: Vec<Value>) {
        self.stack.push(Value::Tuple(self.tuples.len()));
        self.tuples.push(items);
    }

    fn new_dict(&mut self) {
        self.stack.push(Value::Dict(self.dicts.len()));
        self.dicts.push(Vec::new());
    }

    fn set_items(&mut self, items: &[Value]) -> Step<()> {
        let Some(&Value::Dict(dict)) = self.stack.last() else {
            return Err("items are set on something other than a dictionary".into());
        };
        let (pairs, []) = items.as_chunks::<2>() else {
            return Err("a dictionary key has no value".into());
        };
        self.dicts[dict].extend(pairs.iter().map(|&[key, value]| (key, value)));
        Ok(())
    }

    fn put(&mut self, slot: u32) -> Step<()> {
        let value = self.pop()?;
        self.stack.push(value);
        self.memo.insert(slot, value);
        Ok(())
    }

    fn get(&mut self, slot: u32) -> Step<()> {
        let value = self.memo.get(&slot).ok_or_else(|| format!("memo slot {slot} is empty"))?;
        self.stack.push(*value);
        Ok(())
    }

    fn import(&mut self, module: Span, name: Span) -> Step<()> {
        let global = match (self.text(module), self.text(name)) {
            ("collections", "OrderedDict") => Global::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Global::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Global::RebuildParameter,
            ("torch", class) if class.ends_with("Storage") => {
                within("bytes of a storage's class", class.len(), MAX_CLASS)?;
                Global::Storage(name)
            }
            (module, name) => {
                return Err(format!(
                    "it asks for {}.{}, and nothing in a pickle is executed; save a plain dictionary of tensors, or safetensors",
                    super::escape(module),
                    super::escape(name)
                ));
            }
        };
        self.stack.push(Value::Global(global));
        Ok(())
    }

    /// `("storage", class, key, location, elements)`, the only persistent id that torch writes.
    fn persistent_id(&mut self) -> Step<()> {
        let id = self.pop()?;
        let Value::Tuple(tuple) = id else {
            return Err(format!("a persistent id is {}, not a tuple", self.kind(id)));
        };
        let [
            Value::Str(tag),
            Value::Global(Global::Storage(class)),
            Value::Str(key),
            Value::Str(_),
            Value::Int(elements),
        ] = self.tuples[tuple][..]
        else {
            return Err("a persistent id is not a storage".into());
        };
        if self.text(tag) != "storage" {
            return Err("a persistent id is not a storage".into());
        }
        within("bytes of a storage's key", self.text(key).len(), MAX_KEY)?;
        let elements = u64::try_from(elements).map_err(|_| format!("a storage of {elements} elements"))?;
        self.stack.push(Value::Storage(self.storages.len()));
        self.storages.push(Storage { class, key, elements });
        Ok(())
    }

    fn reduce(&mut self) -> Step<()> {
        let (arguments, callable) = (self.pop()?, self.pop()?);
        let (Value::Global(global), Value::Tuple(arguments)) = (callable, arguments) else {
            return Err(format!("a call of {} with {}", self.kind(callable), self.kind(arguments)));
        };
        let arguments = &self.tuples[arguments];
        match (global, &arguments[..]) {
            (Global::OrderedDict, []) => self.new_dict(),
            // (storage, offset, size, stride, requires_grad, backward_hooks[, metadata])
            (
                Global::RebuildTensor,
                &[
                    Value::Storage(storage),
                    Value::Int(offset),
                    Value::Tuple(size),
                    Value::Tuple(stride),
                    _,
                    _,
                    ..,
                ],
            ) => {
                let numbers = |tuple: usize| -> Step<Vec<u64>> {
                    let number = |value: &Value| match value {
                        Value::Int(number) => u64::try_from(*number).ok(),
                        _ => None,
                    };
                    within("dimensions of a tensor", self.tuples[tuple].len(), MAX_DIMENSIONS)?;
                    let numbers = self.tuples[tuple].iter().map(number).collect::<Option<_>>();
                    numbers.ok_or_else(|| "a tensor's size or stride is not a tuple of numbers >= 0".into())
                };
                within("tensors", self.tensors.len() + 1, MAX_TENSORS)?;
                let storage = &self.storages[storage];
                let tensor = PickledTensor {
                    storage_class: self.text(storage.class).to_owned(),
                    key: self.text(storage.key).to_owned(),
                    storage_elements: storage.elements,
                    offset: u64::try_from(offset).map_err(|_| format!("a storage offset of {offset}"))?,
                    shape: numbers(size)?,
                    stride: numbers(stride)?,
                };
                self.stack.push(Value::Tensor(self.tensors.len()));
                self.tensors.push(tensor);
            }
            // (data, requires_grad, backward_hooks)
            (Global::RebuildParameter, &[tensor @ Value::Tensor(_), _, _]) => self.stack.push(tensor),
            _ => return Err("a call with arguments that torch does not write".into()),
        }
        Ok(())
    }

    fn kind(&self, value: Value) -> &'static str {
        match value {
            Value::Mark => "a mark",
            Value::None => "None",
            Value::Bool => "a bool",
            Value::Int(_) => "an integer",
            Value::Other => "a float or a list",
            Value::Str(_) => "a string",
            Value::Tuple(_) => "a tuple",
            Value::Dict(_) => "a dictionary",
            Value::Global(_) => "a class",
            Value::Storage(_) => "a storage",
            Value::Tensor(_) => "a tensor",
        }
    }
}

#[cfg(test)]
pub(super) mod tests;

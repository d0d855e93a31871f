//! Slots that are named by index and generation, so that a stale name is noticed.

use std::fmt;
use std::marker::PhantomData;
use std::ops::{Index, IndexMut};

/// A name that an [`Arena`] can hand out.
pub(crate) trait Name: Copy {
    fn new(index: u32, generation: u32) -> Self;
    fn parts(self) -> (u32, u32);
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $letter:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name {
            index: u32,
            generation: u32,
        }

        impl Name for $name {
            fn new(index: u32, generation: u32) -> Self {
                Self { index, generation }
            }
            fn parts(self) -> (u32, u32) {
                (self.index, self.generation)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}{}.{}", $letter, self.index, self.generation)
            }
        }
    };
}

name!(
    /// Names an active vertex. Never reused.
    VertexId,
    "v"
);
name!(
    /// Names an edge of an active vertex. Never reused.
    EdgeId,
    "e"
);

/// Values named by `I`; slots are reused under a new generation.
#[derive(Debug)]
pub(crate) struct Arena<I, T> {
    slots: Vec<(u32, Option<T>)>,
    free: Vec<u32>,
    name: PhantomData<I>,
}

impl<I, T> Default for Arena<I, T> {
    fn default() -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            name: PhantomData,
        }
    }
}

impl<I: Name + fmt::Debug, T> Arena<I, T> {
    /// Stores a value and names it.
    pub(crate) fn insert(&mut self, value: T) -> I {
        if let Some(index) = self.free.pop() {
            let slot = &mut self.slots[index as usize];
            slot.1 = Some(value);
            return I::new(index, slot.0);
        }
        let index = u32::try_from(self.slots.len()).expect("fewer than 2^32 vertices are active at once");
        self.slots.push((0, Some(value)));
        I::new(index, 0)
    }

    /// Finds a value unless it was removed.
    pub(crate) fn get(&self, name: I) -> Option<&T> {
        let (index, generation) = name.parts();
        self.slots
            .get(index as usize)
            .filter(|slot| slot.0 == generation)
            .and_then(|slot| slot.1.as_ref())
    }

    /// Finds a value unless it was removed.
    pub(crate) fn get_mut(&mut self, name: I) -> Option<&mut T> {
        let (index, generation) = name.parts();
        self.slots
            .get_mut(index as usize)
            .filter(|slot| slot.0 == generation)
            .and_then(|slot| slot.1.as_mut())
    }

    /// Takes a value out.
    pub(crate) fn remove(&mut self, name: I) -> Option<T> {
        let (index, generation) = name.parts();
        let slot = self
            .slots
            .get_mut(index as usize)
            .filter(|slot| slot.0 == generation)?;
        let value = slot.1.take()?;
        slot.0 = slot.0.wrapping_add(1);
        self.free.push(index);
        Some(value)
    }

    /// Walks all values in slot order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (I, &T)> {
        self.slots
            .iter()
            .enumerate()
            .filter_map(|(index, (generation, value))| {
                let index = u32::try_from(index).ok()?;
                value.as_ref().map(|value| (I::new(index, *generation), value))
            })
    }

    /// Counts the values.
    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}

impl<I: Name + fmt::Debug, T> Index<I> for Arena<I, T> {
    type Output = T;
    fn index(&self, name: I) -> &T {
        self.get(name).unwrap_or_else(|| panic!("{name:?} is not active"))
    }
}

impl<I: Name + fmt::Debug, T> IndexMut<I> for Arena<I, T> {
    fn index_mut(&mut self, name: I) -> &mut T {
        self.get_mut(name)
            .unwrap_or_else(|| panic!("{name:?} is not active"))
    }
}

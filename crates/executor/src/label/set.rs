//! Setting labels of a process that is about to become a container's program.
//!
//! They are attributes of the calling task below `/proc`, which the kernel lets nobody else write.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::path::Path;

use super::ProcessLabels;
use crate::supervisor::plain;

/// Attributes of the own task, open since before its root changed: what is at `/proc` afterwards is the container's.
#[derive(Debug)]
pub(crate) struct Writer {
    apparmor: Option<(File, String)>,
    selinux: Option<(File, String)>,
}

impl Writer {
    /// Opens what is to be written. `proc` is where `/proc` is.
    ///
    /// # Errors
    /// If the kernel has no such attribute, with its name.
    pub(crate) fn open(labels: &ProcessLabels, proc: &Path) -> io::Result<Self> {
        let task = proc.join("thread-self/attr");
        let apparmor = match labels.apparmor.as_str() {
            "" => None,
            // Where several modules share the old name, the new one is AppArmor's alone.
            profile => {
                let file = match open(&task.join("apparmor/exec")) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => open(&task.join("exec")),
                    result => result,
                };
                Some((file?, format!("exec {profile}")))
            }
        };
        let selinux = match labels.selinux.as_str() {
            "" => None,
            context => Some((open(&task.join("exec"))?, context.to_owned())),
        };
        Ok(Self { apparmor, selinux })
    }

    /// Sets the labels of the program that this task executes next.
    ///
    /// # Errors
    /// If the kernel refuses one, e.g. because no such profile is loaded; the error names it.
    pub(crate) fn label_program(self) -> io::Result<()> {
        for (file, text) in [self.apparmor, self.selinux].into_iter().flatten() {
            write(file, &text)?;
        }
        Ok(())
    }
}

/// Sets the context of the keys and keyrings that this task makes, until it executes a program.
///
/// # Errors
/// If the kernel refuses it.
pub(crate) fn label_keys(context: &str, proc: &Path) -> io::Result<()> {
    let file = open(&proc.join("thread-self/attr/keycreate"))?;
    write(file, context)
}

fn open(path: &Path) -> io::Result<File> {
    let opened = OpenOptions::new().write(true).open(path);
    opened.map_err(|error| io::Error::new(error.kind(), format!("{}: {}", path.display(), plain(&error))))
}

/// The kernel takes a label in one write.
fn write(mut file: File, text: &str) -> io::Result<()> {
    match file.write(text.as_bytes()) {
        Ok(count) if count == text.len() => Ok(()),
        Ok(_) => Err(io::Error::other(format!("label {text:?} was cut short"))),
        Err(error) => Err(io::Error::new(
            error.kind(),
            format!("label {text:?}: {}", plain(&error)),
        )),
    }
}

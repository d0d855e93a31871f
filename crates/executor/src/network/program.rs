//! Running the programs that networks are made with, with an end to everybody's patience.

use std::io::{self, Read as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal};

/// Most bytes that are kept of each stream.
const MAX_OUTPUT_BYTES: u64 = 1 << 20;

/// What a program wrote, and how it ended.
#[derive(Debug)]
pub(super) struct Output {
    pub(super) status: ExitStatus,
    pub(super) stdout: Vec<u8>,
    pub(super) stderr: String,
}

/// Runs a program to its end with some input; one that takes longer is killed, with all that it started. Blocking.
pub(super) fn run(command: &mut Command, input: &[u8], limit: Duration) -> io::Result<Output> {
    // A group of its own, so that nothing of it survives being killed and keeps our pipes open.
    let mut child = command
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    std::thread::scope(|scope| {
        let writing = scope.spawn(move || {
            // One that does not read its input says why by its exit status.
            if let Some(mut stdin) = stdin {
                let _ = stdin.write_all(input);
            }
        });
        let reading = scope.spawn(move || read_some(stdout));
        let errors = scope.spawn(move || read_some(stderr));
        let status = wait(&mut child, limit);
        let _ = writing.join();
        let (stdout, stderr) = (
            reading.join().unwrap_or_default(),
            errors.join().unwrap_or_default(),
        );
        Ok(Output {
            status: status?,
            stdout,
            stderr: String::from_utf8_lossy(&stderr).trim().to_owned(),
        })
    })
}

fn read_some(stream: Option<impl io::Read>) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Some(mut stream) = stream {
        let _ = stream.by_ref().take(MAX_OUTPUT_BYTES).read_to_end(&mut bytes);
        // What is too much must not block the program.
        let _ = io::copy(&mut stream, &mut io::sink());
    }
    bytes
}

fn wait(child: &mut Child, limit: Duration) -> io::Result<ExitStatus> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| io::Error::other("a child without a number"))?;
    // It is not reaped before `wait`, so the number is its own.
    let ended = rustix::process::pidfd_open(pid, PidfdFlags::empty()).and_then(|process| {
        let mut polled = [PollFd::new(&process, PollFlags::IN)];
        let limit = Timespec {
            tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(limit.subsec_nanos()),
        };
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut polled, Some(&limit)))
    });
    let kill = || rustix::process::kill_process_group(pid, Signal::KILL);
    match ended {
        Ok(0) => {
            let _ = kill();
            child.wait()?;
            Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("it did not end within {} s", limit.as_secs_f32()),
            ))
        }
        Ok(_) => {
            // What it left behind would keep our pipes open.
            let _ = kill();
            child.wait()
        }
        Err(error) => {
            let _ = kill();
            child.wait()?;
            Err(error.into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn input_and_output_are_passed() {
        let output = run(
            &mut shell("cat; echo no >&2; exit 3"),
            b"yes",
            Duration::from_secs(60),
        )
        .unwrap();
        assert_eq!(
            (output.stdout.as_slice(), output.stderr.as_str()),
            (&b"yes"[..], "no")
        );
        assert_eq!(output.status.code(), Some(3));
    }

    #[test]
    fn one_that_takes_too_long_is_killed_with_its_children() {
        let error = run(
            &mut shell("sleep 1000 & sleep 1000"),
            b"",
            Duration::from_millis(10),
        )
        .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}

//! `LLBBridge.ExecProcess`: the processes of a client's containers, all on one stream.
//!
//! Whatever goes wrong with one process is told as its exit: an error on the stream would end the others too, and clients
//! wait for the exit of a process that they began.

use std::collections::BTreeMap;
use std::io;
use std::pin::pin;
use std::time::Duration;

use api::pb::gateway as pb;
use api::pb::gateway::exec_message::Input;
use bytes::Bytes;
use engine::bridge::{BuildProcess, Forwarder, ProcessOutput, ProcessRequest};
use engine::{BuildError, ErrorKind};
use futures_util::future::BoxFuture;
use futures_util::{Stream, StreamExt as _};
use rustix::process::Signal;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Status, Streaming};

use super::Answers;
use super::failure::failure;

/// Answers on their way to the client.
const ANSWER_QUEUE: usize = 32;
/// Messages on their way to one process, of input and of everything else.
const PROCESS_QUEUE: usize = 64;
/// Processes that may run at once on one stream.
const MAX_PROCESSES: usize = 1024;
/// How much of a process' output is read at once.
const PIECE_BYTES: usize = 32 << 10;
/// How long output may stay away once its process has ended, while others hold the stream open.
const LINGER: Duration = Duration::from_secs(1);
/// Exit code of a process whose own is not known.
const UNKNOWN_EXIT: u32 = 255;
/// The numbers of input, output and errors.
const STREAMS: [u32; 3] = [0, 1, 2];

/// Serves one stream of messages. It ends with the client's interest.
pub(super) fn serve(forwarder: Forwarder, incoming: Streaming<pb::ExecMessage>) -> Answers<pb::ExecMessage> {
    let (answers, messages) = mpsc::channel(ANSWER_QUEUE);
    let task = AbortOnDropHandle::new(tokio::spawn(dispatch(forwarder, incoming, answers)));
    Box::pin(ReceiverStream::new(messages).map(move |message| {
        // The task lives as long as the stream that it serves.
        let _owned = &task;
        message
    }))
}

type Answer = Result<pb::ExecMessage, Status>;

/// What is sent to one process.
#[derive(Debug)]
struct Channels {
    input: mpsc::Sender<Bytes>,
    control: mpsc::Sender<Control>,
}

/// What can be done to a process beside its input.
#[derive(Debug)]
enum Control {
    Resize(pb::ResizeMessage),
    Signal(i32),
}

/// Hands messages to their processes until the client sends no more, then waits for the processes.
async fn dispatch(
    forwarder: Forwarder,
    mut incoming: Streaming<pb::ExecMessage>,
    answers: mpsc::Sender<Answer>,
) {
    let mut channels: BTreeMap<String, Channels> = BTreeMap::new();
    let mut running: JoinSet<String> = JoinSet::new();
    loop {
        let message = tokio::select! {
            Some(ended) = running.join_next() => {
                if let Ok(id) = ended {
                    channels.remove(&id);
                }
                continue;
            }
            message = incoming.message() => message,
        };
        let message = match message {
            Ok(Some(message)) => message,
            Ok(None) | Err(_) => break,
        };
        let handled = match message.input {
            Some(Input::Init(init)) => {
                begin(
                    &forwarder,
                    &answers,
                    &mut channels,
                    &mut running,
                    message.process_id,
                    init,
                )
                .await
            }
            Some(input) => pass_on(&mut channels, &message.process_id, input).await,
            None => Ok(()),
        };
        if let Err(status) = handled {
            // A client that has gone needs no answer.
            let _ = answers.send(Err(status)).await;
            return;
        }
    }
    // Their inputs end; what they still write is wanted.
    drop(channels);
    while running.join_next().await.is_some() {}
}

async fn begin(
    forwarder: &Forwarder,
    answers: &mpsc::Sender<Answer>,
    channels: &mut BTreeMap<String, Channels>,
    running: &mut JoinSet<String>,
    id: String,
    init: pb::InitMessage,
) -> Result<(), Status> {
    if id.is_empty() {
        return Err(Status::invalid_argument("ProcessID required"));
    }
    if channels.contains_key(&id) {
        return Err(Status::already_exists(format!("Process {id} already exists")));
    }
    if running.len() >= MAX_PROCESSES {
        return Err(Status::resource_exhausted(format!(
            "more than {MAX_PROCESSES} processes"
        )));
    }
    let (input, inputs) = mpsc::channel(PROCESS_QUEUE);
    let (control, controls) = mpsc::channel(PROCESS_QUEUE);
    channels.insert(id.clone(), Channels { input, control });
    let outgoing = Outgoing {
        id,
        answers: answers.clone(),
    };
    let wanted = STREAMS.map(|fd| init.fds.contains(&fd));
    // Processes start in the order in which they are asked for, and the client may go on at once: it reads what one
    // writes only after it has started the one that takes it.
    let starting = start(forwarder, init, wanted);
    outgoing.send(Input::Started(pb::StartedMessage {})).await;
    running.spawn(run(starting, wanted, outgoing, inputs, controls));
    Ok(())
}

/// Hands a message to its process. What comes for one that has ended crossed with its exit and is dropped.
async fn pass_on(channels: &mut BTreeMap<String, Channels>, id: &str, input: Input) -> Result<(), Status> {
    let Some(process) = channels.get_mut(id) else {
        return Ok(());
    };
    match input {
        Input::File(file) if file.fd == 0 => {
            if !file.data.is_empty() {
                // Fails for a process that reads no more.
                let _ = process.input.send(file.data).await;
            }
            if file.eof {
                let (ended, _) = mpsc::channel(1);
                process.input = ended;
            }
        }
        Input::File(file) => {
            return Err(Status::out_of_range(format!(
                "fd {} unavailable to write",
                file.fd
            )));
        }
        Input::Resize(size) => {
            let _ = process.control.send(Control::Resize(size)).await;
        }
        Input::Signal(signal) => {
            let number = signal_number(&signal.name);
            let unknown = || Status::invalid_argument(format!("Unknown signal {}", signal.name));
            let _ = process
                .control
                .send(Control::Signal(number.ok_or_else(unknown)?))
                .await;
        }
        // These are ours to send.
        Input::Init(_) | Input::Started(_) | Input::Exit(_) | Input::Done(_) => {}
    }
    Ok(())
}

/// Sends what one process has to say.
#[derive(Clone, Debug)]
struct Outgoing {
    id: String,
    answers: mpsc::Sender<Answer>,
}

impl Outgoing {
    async fn send(&self, input: Input) {
        let message = pb::ExecMessage {
            process_id: self.id.clone(),
            input: Some(input),
        };
        // A client that has gone needs no answer.
        let _ = self.answers.send(Ok(message)).await;
    }

    async fn output(&self, fd: u32, data: Bytes) {
        let eof = data.is_empty();
        self.send(Input::File(pb::FdMessage { fd, eof, data })).await;
    }

    async fn exit(&self, outcome: Result<(), BuildError>) {
        let exit = match outcome {
            Ok(()) => pb::ExitMessage::default(),
            Err(error) => pb::ExitMessage {
                code: error.exit_code().unwrap_or(UNKNOWN_EXIT),
                error: Some(failure(&error).to_rpc()),
            },
        };
        self.send(Input::Exit(exit)).await;
    }
}

type Starting = BoxFuture<'static, Result<BuildProcess, BuildError>>;

/// Awaits a process' start and carries its streams until it has ended. Returns its id.
async fn run(
    starting: Starting,
    wanted: [bool; 3],
    outgoing: Outgoing,
    inputs: mpsc::Receiver<Bytes>,
    controls: mpsc::Receiver<Control>,
) -> String {
    let started = starting.await;
    match started {
        Ok(process) => Box::pin(carry(process, wanted, &outgoing, inputs, controls)).await,
        Err(error) => {
            let [_, stdout, stderr] = wanted;
            if stderr && error.exit_code().is_some() {
                outgoing.output(2, format!("{error}\n").into()).await;
            }
            for (fd, is_open) in [(1, stdout), (2, stderr)] {
                if is_open {
                    outgoing.output(fd, Bytes::new()).await;
                }
            }
            outgoing.exit(Err(error)).await;
        }
    }
    outgoing.send(Input::Done(pb::DoneMessage {})).await;
    outgoing.id
}

fn start(forwarder: &Forwarder, init: pb::InitMessage, streams: [bool; 3]) -> Starting {
    let refused = |error| Box::pin(std::future::ready(Err(error)));
    let container = match forwarder.container(&init.container_id) {
        Ok(container) => container,
        Err(error) => return refused(error),
    };
    let meta = init.meta.unwrap_or_default();
    if meta.args.is_empty() {
        return refused(BuildError::new(ErrorKind::User, "invalid process with no args"));
    }
    let request = ProcessRequest {
        args: meta.args,
        env: meta.env,
        secret_env: init.secretenv,
        user: meta.user,
        cwd: meta.cwd,
        tty: init.tty,
        security: init.security,
        remove_stubs_recursive: meta.remove_mount_stubs_recursive,
        streams,
    };
    Box::pin(container.start(request))
}

async fn carry(
    mut process: BuildProcess,
    [_, stdout, stderr]: [bool; 3],
    outgoing: &Outgoing,
    inputs: mpsc::Receiver<Bytes>,
    controls: mpsc::Receiver<Control>,
) {
    let ended = CancellationToken::new();
    let stdin = process.stdin.take();
    let write = stdin.map(|mut stdin| async move |data: Bytes| stdin.write_all(&data).await);
    let writing = show(1, process.stdout.take(), stdout, outgoing, &ended);
    let complaining = show(2, process.stderr.take(), stderr, outgoing, &ended);
    let process = &process;
    let waiting = async {
        let outcome = process.wait().await;
        ended.cancel();
        outgoing.exit(outcome).await;
    };
    let inputs = ReceiverStream::new(inputs);
    let steering = steer(write, inputs, controls, |control| apply(process, control));
    let steering = ended.run_until_cancelled(steering);
    tokio::join!(steering, writing, complaining, waiting);
}

/// Hands a process what its client sends, until the process or all of that ends. A change of the terminal's size or a signal
/// comes before the input that the client sent after it, and waits for none.
async fn steer(
    mut write: Option<impl AsyncFnMut(Bytes) -> io::Result<()>>,
    inputs: impl Stream<Item = Bytes>,
    mut controls: mpsc::Receiver<Control>,
    mut apply: impl FnMut(Control),
) {
    let mut inputs = pin!(inputs);
    loop {
        let data = tokio::select! {
            biased;
            Some(control) = controls.recv() => {
                apply(control);
                continue;
            }
            data = inputs.next(), if write.is_some() => data,
            else => return,
        };
        let written = match (data, &mut write) {
            (Some(data), Some(write)) => apply_while(write(data), &mut controls, &mut apply).await,
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        };
        if written.is_err() {
            write = None;
        }
    }
}

/// Awaits a write and applies what has come by now, before, and what comes meanwhile.
async fn apply_while(
    writing: impl Future<Output = io::Result<()>>,
    controls: &mut mpsc::Receiver<Control>,
    apply: &mut impl FnMut(Control),
) -> io::Result<()> {
    let mut writing = pin!(writing);
    loop {
        tokio::select! {
            biased;
            Some(control) = controls.recv() => apply(control),
            written = &mut writing => return written,
        }
    }
}

/// Sends a process' output until it ends, or stays away after the process' end.
async fn show(
    fd: u32,
    from: Option<ProcessOutput>,
    wanted: bool,
    outgoing: &Outgoing,
    ended: &CancellationToken,
) {
    if let Some(mut from) = from {
        loop {
            let lingered = async {
                ended.cancelled().await;
                tokio::time::sleep(LINGER).await;
            };
            let data = tokio::select! {
                biased;
                data = from.read(PIECE_BYTES) => data.unwrap_or_default(),
                () = lingered => Bytes::new(),
            };
            if data.is_empty() {
                break;
            }
            outgoing.output(fd, data).await;
        }
    }
    if wanted {
        outgoing.output(fd, Bytes::new()).await;
    }
}

fn apply(process: &BuildProcess, control: Control) {
    let failed = match control {
        Control::Signal(number) => process.signal(number).err().map(|error| error.to_string()),
        Control::Resize(size) => {
            let cells = |count: u32| u16::try_from(count).unwrap_or(u16::MAX);
            let resized = process.resize(cells(size.rows), cells(size.cols));
            resized.err().map(|error| error.to_string())
        }
    };
    if let Some(error) = failed {
        tracing::debug!(error, "a process of a container did not take a message");
    }
}

/// Returns a signal's number by its name, with or without `SIG`.
fn signal_number(name: &str) -> Option<i32> {
    let signal = match name.strip_prefix("SIG").unwrap_or(name) {
        "ABRT" | "IOT" => Signal::ABORT,
        "ALRM" => Signal::ALARM,
        "BUS" => Signal::BUS,
        "CHLD" | "CLD" => Signal::CHILD,
        "CONT" => Signal::CONT,
        "FPE" => Signal::FPE,
        "HUP" => Signal::HUP,
        "ILL" => Signal::ILL,
        "INT" => Signal::INT,
        "IO" | "POLL" => Signal::IO,
        "KILL" => Signal::KILL,
        "PIPE" => Signal::PIPE,
        "PROF" => Signal::PROF,
        "PWR" => Signal::POWER,
        "QUIT" => Signal::QUIT,
        "SEGV" => Signal::SEGV,
        "STKFLT" => Signal::STKFLT,
        "STOP" => Signal::STOP,
        "SYS" => Signal::SYS,
        "TERM" => Signal::TERM,
        "TRAP" => Signal::TRAP,
        "TSTP" => Signal::TSTP,
        "TTIN" => Signal::TTIN,
        "TTOU" => Signal::TTOU,
        "URG" => Signal::URG,
        "USR1" => Signal::USR1,
        "USR2" => Signal::USR2,
        "VTALRM" => Signal::VTALARM,
        "WINCH" => Signal::WINCH,
        "XCPU" => Signal::XCPU,
        "XFSZ" => Signal::XFSZ,
        _ => return None,
    };
    Some(signal.as_raw())
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use futures_util::{FutureExt as _, stream};
    use tokio::sync::Notify;

    use super::*;

    #[test]
    fn signals_have_names() {
        assert_eq!(signal_number("KILL"), Some(9));
        assert_eq!(signal_number("SIGTERM"), Some(15));
        assert_eq!(signal_number("HUP"), Some(1));
        assert_eq!(signal_number("15"), None);
        assert_eq!(signal_number(""), None);
    }

    #[tokio::test]
    async fn late_messages_are_dropped_and_foreign_streams_refused() {
        let file = |fd| {
            Input::File(pb::FdMessage {
                fd,
                eof: true,
                data: Bytes::from_static(b"x"),
            })
        };
        let mut channels = BTreeMap::new();
        assert!(pass_on(&mut channels, "gone", file(0)).await.is_ok());
        let (input, mut inputs) = mpsc::channel(4);
        let (control, mut controls) = mpsc::channel(4);
        channels.insert("p".to_owned(), Channels { input, control });
        assert!(pass_on(&mut channels, "p", file(1)).await.is_err());
        assert!(pass_on(&mut channels, "p", file(0)).await.is_ok());
        assert_eq!(inputs.recv().await.unwrap(), "x");
        assert!(inputs.recv().await.is_none());
        assert!(pass_on(&mut channels, "p", file(0)).await.is_ok());
        let signal = |name: &str| {
            Input::Signal(pb::SignalMessage {
                name: name.to_owned(),
            })
        };
        assert!(pass_on(&mut channels, "p", signal("NONE")).await.is_err());
        assert!(pass_on(&mut channels, "p", signal("INT")).await.is_ok());
        assert!(matches!(controls.recv().await, Some(Control::Signal(2))));
    }

    #[tokio::test]
    async fn controls_come_before_later_input() {
        let seen = Mutex::new(Vec::new());
        let note = |what: u32| seen.lock().unwrap().push(what);
        let (control, controls) = mpsc::channel(4);
        // Each control comes at the last moment before the input that is sent after it.
        let inputs = stream::iter(1..=3_u8).map(move |number| {
            let size = pb::ResizeMessage {
                rows: number.into(),
                cols: 0,
            };
            control.try_send(Control::Resize(size)).unwrap();
            Bytes::copy_from_slice(&[10 * number])
        });
        let write = Some(async |data: Bytes| {
            note(data[0].into());
            Ok(())
        });
        let applied = |control| match control {
            Control::Resize(size) => note(size.rows),
            Control::Signal(_) => unreachable!(),
        };
        // It waits for more controls in the end.
        assert_eq!(steer(write, inputs, controls, applied).now_or_never(), None);
        assert_eq!(*seen.lock().unwrap(), [1, 10, 2, 20, 3, 30]);
    }

    #[tokio::test]
    async fn controls_wait_for_no_input_that_is_not_read() {
        let (control, controls) = mpsc::channel(4);
        let inputs = stream::iter([Bytes::from_static(b"never read")]);
        let blocked = Notify::new();
        let write = Some(async |_| {
            blocked.notify_one();
            std::future::pending().await
        });
        let (applied, mut outcomes) = mpsc::unbounded_channel();
        let steering = steer(write, inputs, controls, move |control| {
            applied.send(control).unwrap();
        });
        tokio::select! {
            () = steering => unreachable!("it writes for ever"),
            () = async {
                blocked.notified().await;
                control.send(Control::Signal(9)).await.unwrap();
                assert!(matches!(outcomes.recv().await, Some(Control::Signal(9))));
            } => {}
        }
    }

    #[tokio::test]
    async fn controls_go_on_after_the_input_ended() {
        let (control, controls) = mpsc::channel(4);
        control.send(Control::Signal(2)).await.unwrap();
        control.send(Control::Signal(9)).await.unwrap();
        drop(control);
        let mut count = 0;
        steer(Some(async |_| Ok(())), stream::empty(), controls, |_| count += 1).await;
        assert_eq!(count, 2);
    }
}

//! The supervisor: a process with one thread that makes containers, waits for them and says how they ended.
//!
//! Its children build the containers ([`child`]); it only starts them, passes on what they report, and removes their
//! cgroups. One child is always made ahead of time (a [`Blank`]): it has its namespaces and its cgroup already and waits
//! to be told what to become, which takes the slowest steps out of a container's start.

pub(crate) mod cgroup;
mod child;
mod credentials;
pub(crate) mod device;
mod entry;
pub(crate) mod rootfs;
pub(crate) mod seccomp;
mod syscalls;
mod terminal;
pub(crate) mod wire;

use std::collections::BTreeMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll;
use rustix::io::Errno;
use rustix::net::RecvFlags;
use rustix::process::{Signal, WaitId, WaitIdOptions, WaitIdStatus};
use rustix::thread::{LinkNameSpaceType, ThreadNameSpaceType};

use self::cgroup::{Cgroup, Layout};
use self::child::{Cradle, Home};
use self::wire::{Answer, ContainerTraits, Failure, Frame, Report, Request};
use crate::request::ContainerId;
use crate::spec::{DeviceNode, NetworkSpec};
use crate::sys::{self, Cloned, SingleThread};

pub(crate) use child::plain;
pub(crate) use entry::ARGUMENT_ZERO;
pub use entry::supervisor_main;

/// Numbers of jobs that no request asked for: blanks.
const FIRST_BLANK: u64 = 1 << 48;
/// What epoll says of the daemon's socket.
const DAEMON: u64 = u64::MAX;
/// Added to a job's number in epoll for its setup socket; without it, for its process.
const SETUP: u64 = 1 << 62;

/// A process that was made.
#[derive(Debug)]
struct Job {
    process: OwnedFd,
    /// Open until the program is executed, or it failed.
    setup: Option<OwnedFd>,
    role: Role,
    prepared: Option<(Vec<u8>, Vec<OwnedFd>)>,
    /// The body of its failure report.
    failure: Option<Vec<u8>>,
    started: bool,
}

#[derive(Debug)]
enum Role {
    Container { cgroup: Cgroup, network: NetworkSpec },
    Process,
}

/// Which devices a container may use.
#[derive(Clone, Copy, Debug)]
enum Rules<'a> {
    All,
    /// Those that every container may use, and these.
    Usual(&'a [DeviceNode]),
}

fn rules(traits: &ContainerTraits) -> Rules<'_> {
    if traits.all_devices {
        Rules::All
    } else {
        Rules::Usual(&traits.devices)
    }
}

/// All the supervisor knows.
#[derive(Debug)]
struct Supervisor {
    proof: SingleThread,
    daemon: OwnedFd,
    epoll: OwnedFd,
    layout: Layout,
    /// Our own process namespace, to come back to.
    own_pid_namespace: OwnedFd,
    /// The loaded device program, on cgroup version 2.
    device_program: Option<OwnedFd>,
    jobs: BTreeMap<u64, Job>,
    /// The blank's number in `jobs`.
    blank: Option<u64>,
    next_blank: u64,
    blanks_fail: bool,
}

impl Supervisor {
    fn new(proof: SingleThread, daemon: OwnedFd) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(
            &epoll,
            &daemon,
            epoll::EventData::new_u64(DAEMON),
            epoll::EventFlags::IN,
        )?;
        let layout = Layout::probe()?;
        let device_program = if layout.unified {
            Some(sys::load_device_program(&device::program(&[]))?)
        } else {
            None
        };
        let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC;
        let own_pid_namespace = rustix::fs::open(c"/proc/self/ns/pid", flags, rustix::fs::Mode::empty())?;
        Ok(Self {
            proof,
            daemon,
            epoll,
            layout,
            own_pid_namespace,
            device_program,
            jobs: BTreeMap::new(),
            blank: None,
            next_blank: FIRST_BLANK,
            blanks_fail: false,
        })
    }

    /// Serves until the daemon is gone.
    fn serve(&mut self) -> io::Result<()> {
        let mut space = [MaybeUninit::<epoll::Event>::uninit(); 64];
        loop {
            self.make_blank();
            let (events, _) = match epoll::wait(&self.epoll, &mut space[..], None) {
                Err(Errno::INTR) => continue,
                result => result?,
            };
            let ready: Vec<u64> = events.iter().map(|event| event.data.u64()).collect();
            for data in ready {
                if data == DAEMON {
                    if !self.read_requests()? {
                        return Ok(());
                    }
                } else if data & SETUP != 0 {
                    self.read_reports(data & !SETUP)?;
                } else {
                    self.reap(data)?;
                }
            }
        }
    }

    /// Reads all requests there are; `false` when the daemon is gone.
    fn read_requests(&mut self) -> io::Result<bool> {
        loop {
            let frame = match wire::receive::<Request>(self.daemon.as_fd(), RecvFlags::DONTWAIT) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(false),
                result => result?,
            };
            let Some(Frame { header, body, fds }) = frame else {
                return Ok(false);
            };
            match header {
                Request::Start { seq, traits } => {
                    let result = self.start(seq, &traits, &body, fds);
                    self.refuse_if_failed(seq, result)?;
                }
                Request::Exec { seq, container } => {
                    let result = self.exec(seq, container, &body, fds);
                    self.refuse_if_failed(seq, result)?;
                }
                Request::Kill { seq } => {
                    if let Some(job) = self.jobs.get(&seq) {
                        // One that is gone already is what was wanted.
                        let _ = rustix::process::pidfd_send_signal(&job.process, Signal::KILL);
                    }
                }
            }
        }
    }

    fn refuse_if_failed(&self, seq: u64, result: Result<(), String>) -> io::Result<()> {
        match result {
            Ok(()) => Ok(()),
            Err(message) => {
                let body = wire::encode_body(&Failure { message }, &[])?;
                self.answer(&Answer::Failed { seq }, &body, &[])
            }
        }
    }

    fn answer(&self, answer: &Answer, body: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        wire::send(self.daemon.as_fd(), answer, body, fds)
    }

    fn start(
        &mut self,
        seq: u64,
        traits: &ContainerTraits,
        body: &[u8],
        fds: Vec<OwnedFd>,
    ) -> Result<(), String> {
        if self.jobs.contains_key(&seq) || seq >= FIRST_BLANK {
            return Err(format!("number {seq} is taken"));
        }
        // A namespace that is given is entered when it arrives.
        let is_plain = traits.network != NetworkSpec::Loopback && !traits.special_cgroup;
        let mut job = match self.blank.take_if(|_| is_plain) {
            Some(blank) => self
                .take_blank(blank, traits.network)
                .map_err(|error| format!("take a container: {error}"))?,
            None => {
                let cgroup = Cgroup::new(
                    &self.layout,
                    &traits.cgroup_parent,
                    &traits.id,
                    traits.special_cgroup,
                );
                self.spawn(&cgroup, traits.network, rules(traits))?
            }
        };
        let sent = job.setup.as_ref().map(|setup| {
            let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
            wire::send(setup.as_fd(), &(), body, &fds)
        });
        if let Some(Err(error)) = sent
            && error.kind() != io::ErrorKind::BrokenPipe
        {
            job.failure = wire::encode_body(
                &Failure {
                    message: format!("describe the container: {error}"),
                },
                &[],
            )
            .ok();
            let _ = rustix::process::pidfd_send_signal(&job.process, Signal::KILL);
        }
        self.watch(seq, job)
            .map_err(|error| format!("watch the container: {error}"))
    }

    /// Makes a container's first process, which waits for its description.
    fn spawn(&self, cgroup: &Cgroup, network: NetworkSpec, rules: Rules<'_>) -> Result<Job, String> {
        if !self.layout.is_usable() {
            return Err(format!(
                "no control groups are mounted at {}",
                cgroup::MOUNT_POINT
            ));
        }
        let failed = |what: &str| {
            let what = what.to_owned();
            move |error: io::Error| format!("{what}: {error}")
        };
        let (ours, theirs) = wire::socket_pair().map_err(failed("make a socket"))?;
        let directory = if cgroup.is_unified() {
            let directory = cgroup.create_unified().map_err(failed("make the cgroup"))?;
            self.restrict(directory.as_fd(), rules)
                .map_err(failed("restrict devices"))?;
            Some(directory)
        } else {
            None
        };
        let mut flags = libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
        if network == NetworkSpec::Loopback {
            flags |= libc::CLONE_NEWNET;
        }
        let flags = u64::from(flags.unsigned_abs());
        match sys::clone_process(&self.proof, flags, directory.as_ref().map(AsFd::as_fd)) {
            Ok(Cloned::Child(proof)) => child::container_main(
                proof,
                &Cradle {
                    socket: theirs.as_fd(),
                    cgroup,
                    all_devices: matches!(rules, Rules::All),
                },
            ),
            Ok(Cloned::Parent { pidfd }) => Ok(Job {
                process: pidfd,
                setup: Some(ours),
                role: Role::Container {
                    cgroup: cgroup.clone(),
                    network,
                },
                prepared: None,
                failure: None,
                started: false,
            }),
            Err(error) => {
                cgroup.remove();
                Err(format!("make a process: {error}"))
            }
        }
    }

    /// Sets the device rules of a version 2 cgroup.
    fn restrict(&self, cgroup: BorrowedFd<'_>, rules: Rules<'_>) -> io::Result<()> {
        let (Some(usual), Rules::Usual(devices)) = (&self.device_program, rules) else {
            return Ok(());
        };
        if devices.is_empty() {
            return sys::attach_device_program(cgroup, usual.as_fd());
        }
        let own = sys::load_device_program(&device::program(devices))?;
        sys::attach_device_program(cgroup, own.as_fd())
    }

    fn exec(&mut self, seq: u64, container: u64, body: &[u8], fds: Vec<OwnedFd>) -> Result<(), String> {
        let running = self.jobs.get(&container).filter(|job| job.started);
        let Some(Job {
            process: first,
            role: Role::Container { cgroup, network },
            ..
        }) = running
        else {
            return Err("the container has stopped".to_owned());
        };
        if self.jobs.contains_key(&seq) || seq >= FIRST_BLANK {
            return Err(format!("number {seq} is taken"));
        }
        let failed = |error: io::Error| format!("make a process: {error}");
        let (ours, theirs) = wire::socket_pair().map_err(failed)?;
        let home = Home {
            socket: theirs.as_fd(),
            cgroup,
            first: first.as_fd(),
            own_network: *network != NetworkSpec::Host,
        };
        // Only what is made from here on is in the container's process namespace, not we ourselves.
        rustix::thread::move_into_thread_name_spaces(first.as_fd(), ThreadNameSpaceType::PROCESS_ID)
            .map_err(|error| format!("join the container: {error}"))?;
        let cloned = sys::clone_process(&self.proof, 0, None);
        if let Ok(Cloned::Child(proof)) = cloned {
            child::process_main(proof, &home);
        }
        rustix::thread::move_into_link_name_space(
            self.own_pid_namespace.as_fd(),
            Some(LinkNameSpaceType::ProcessID),
        )
        .map_err(|error| format!("return from the container: {error}"))?;
        let Cloned::Parent { pidfd } = cloned.map_err(failed)? else {
            return Err("make a process".to_owned());
        };
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        // A child that is gone already has said why.
        let _ = wire::send(ours.as_fd(), &(), body, &fds);
        let job = Job {
            process: pidfd,
            setup: Some(ours),
            role: Role::Process,
            prepared: None,
            failure: None,
            started: false,
        };
        self.watch(seq, job).map_err(failed)
    }

    fn watch(&mut self, seq: u64, job: Job) -> io::Result<()> {
        let flags = epoll::EventFlags::IN;
        if let Some(setup) = &job.setup {
            epoll::add(&self.epoll, setup, epoll::EventData::new_u64(seq | SETUP), flags)?;
        }
        epoll::add(&self.epoll, &job.process, epoll::EventData::new_u64(seq), flags)?;
        self.jobs.insert(seq, job);
        Ok(())
    }

    /// Makes a container ahead of time unless there is one. Called when nobody's descriptors are held, so that it holds
    /// none.
    fn make_blank(&mut self) {
        if self.blank.is_some() || self.blanks_fail || !self.layout.is_usable() {
            return;
        }
        let cgroup = Cgroup::new(&self.layout, "/", ContainerId::random().as_str(), false);
        // Without a blank the next container is made when it is asked for, and the reason told then.
        if let Ok(job) = self.spawn(&cgroup, NetworkSpec::Host, Rules::Usual(&[])) {
            let number = self.next_blank;
            self.next_blank += 1;
            if self.watch(number, job).is_ok() {
                self.blank = Some(number);
            }
        }
    }

    fn take_blank(&mut self, number: u64, its_network: NetworkSpec) -> io::Result<Job> {
        let mut job = self
            .jobs
            .remove(&number)
            .ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        if let Some(setup) = &job.setup {
            epoll::delete(&self.epoll, setup)?;
        }
        epoll::delete(&self.epoll, &job.process)?;
        if let Role::Container { network, .. } = &mut job.role {
            *network = its_network;
        }
        Ok(job)
    }

    /// Takes in what a child reports.
    fn read_reports(&mut self, seq: u64) -> io::Result<()> {
        while let Some(job) = self.jobs.get_mut(&seq) {
            let Some(setup) = &job.setup else { break };
            match wire::receive::<Report>(setup.as_fd(), RecvFlags::DONTWAIT) {
                Ok(Some(Frame {
                    header: Report::Prepared,
                    body,
                    fds,
                })) => job.prepared = Some((body, fds)),
                Ok(Some(Frame {
                    header: Report::Failed,
                    body,
                    ..
                })) => job.failure = Some(body),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Ok(None) | Err(_) => {
                    job.setup = None;
                    self.announce(seq)?;
                }
            }
        }
        Ok(())
    }

    /// Tells the daemon that a program runs, if it does.
    fn announce(&mut self, seq: u64) -> io::Result<()> {
        let Some(job) = self.jobs.get_mut(&seq) else {
            return Ok(());
        };
        if job.failure.is_some() {
            return Ok(());
        }
        let Some((body, fds)) = job.prepared.take() else {
            return Ok(());
        };
        job.started = true;
        let process = rustix::io::fcntl_dupfd_cloexec(&job.process, 3)?;
        let all: Vec<BorrowedFd<'_>> = std::iter::once(process.as_fd())
            .chain(fds.iter().map(AsFd::as_fd))
            .collect();
        self.answer(&Answer::Started { seq }, &body, &all)
    }

    /// Takes in a process' end.
    fn reap(&mut self, seq: u64) -> io::Result<()> {
        self.read_reports(seq)?;
        let Some(job) = self.jobs.get(&seq) else {
            return Ok(());
        };
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        let Some(status) = rustix::process::waitid(WaitId::PidFd(job.process.as_fd()), options)? else {
            return Ok(());
        };
        let Some(job) = self.jobs.remove(&seq) else {
            return Ok(());
        };
        epoll::delete(&self.epoll, &job.process)?;
        let mut oom_killed = false;
        if let Role::Container { cgroup, .. } = &job.role {
            oom_killed = cgroup.was_oom_killed();
            cgroup.remove();
        }
        if self.blank == Some(seq) {
            // One that could not be made would fail again and again; a request will say why.
            self.blank = None;
            self.blanks_fail |= job.failure.is_some();
            return Ok(());
        }
        if seq >= FIRST_BLANK {
            return Ok(());
        }
        let (code, signal) = exit_code(&status);
        if job.started {
            return self.answer(
                &Answer::Exited {
                    seq,
                    code,
                    signal,
                    oom_killed,
                },
                &[],
                &[],
            );
        }
        let body = match job.failure {
            Some(body) => body,
            None => {
                let message = format!("the container ended while it was set up (exit code {code})");
                wire::encode_body(&Failure { message }, &[])?
            }
        };
        self.answer(&Answer::Failed { seq }, &body, &[])
    }
}

impl Supervisor {
    /// Ends everything and waits until it is gone.
    fn kill_all(&mut self) {
        for job in self.jobs.values() {
            let _ = rustix::process::pidfd_send_signal(&job.process, Signal::KILL);
        }
        // Further processes of a container are waited for before its first one, which cannot end before they are.
        let is_container = |job: &Job| matches!(job.role, Role::Container { .. });
        let (containers, processes): (Vec<Job>, Vec<Job>) = std::mem::take(&mut self.jobs)
            .into_values()
            .partition(is_container);
        for job in processes.into_iter().chain(containers) {
            let _ = rustix::process::waitid(WaitId::PidFd(job.process.as_fd()), WaitIdOptions::EXITED);
            if let Role::Container { cgroup, .. } = &job.role {
                cgroup.remove();
            }
        }
    }
}

fn exit_code(status: &WaitIdStatus) -> (u32, Option<i32>) {
    if let Some(signal) = status.terminating_signal() {
        return (128 + signal.unsigned_abs(), Some(signal));
    }
    (status.exit_status().map_or(255, i32::unsigned_abs), None)
}

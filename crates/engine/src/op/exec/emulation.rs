//! Programs of other platforms: the kernel hands them to an emulator that is registered with it (`binfmt_misc`), or the step
//! gets one of the daemon's own (`buildkit-qemu-*`), as in BuildKit. Where there is neither, the failed step says so.

use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::sync::Arc;

use executor::{ContainerMount, MountSource, RunError, RunRequest};
use llb::pb;
use oci::{Platform, PlatformMatcher};

use crate::error::BuildError;
use crate::progress::{LogStream, VertexProgress};

/// Where a container finds the daemon's emulator.
const TARGET: &str = "/dev/.buildkit_qemu_emulator";
/// How the names of the daemon's emulators begin.
const PREFIX: &str = "buildkit-qemu-";

/// What runs programs here. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Emulators {
    /// Platforms whose programs the kernel runs.
    runs: Arc<[Platform]>,
    /// Directories that may have emulators, as in `PATH`.
    path: Option<OsString>,
}

/// How a platform's programs are run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Means {
    /// By the kernel.
    Kernel,
    /// By an emulator of the daemon's.
    Emulator(PathBuf),
    /// Not at all; the platform's name, and the emulator that was looked for.
    None { platform: String, emulator: String },
}

impl Emulators {
    /// Knows the platforms whose programs the kernel runs, and where to look for emulators: the value of a `PATH`.
    pub fn new(runs: &[Platform], path: Option<OsString>) -> Self {
        Self {
            runs: runs.into(),
            path,
        }
    }

    /// Finds out how programs of a platform are run; without one it is the host's. Blocking.
    ///
    /// # Errors
    /// For a level of x86-64 that the processor does not have.
    pub(super) fn means(&self, platform: Option<&pb::Platform>) -> Result<Means, BuildError> {
        let Some(platform) = platform else {
            return Ok(Means::Kernel);
        };
        let wanted = Platform::from(platform).normalized();
        let matches = |known: &Platform| PlatformMatcher::only(known).matches(&wanted);
        if self.runs.is_empty() || self.runs.iter().any(matches) {
            return Ok(Means::Kernel);
        }
        if wanted.architecture == "amd64" && !matches!(wanted.variant.as_str(), "" | "v2") {
            let same = |known: &&Platform| known.architecture == wanted.architecture;
            let known: Vec<String> = self.runs.iter().filter(same).map(ToString::to_string).collect();
            return Err(BuildError::user(format!(
                "no support for running processes with {wanted} platform, supported: {}",
                known.join(", ")
            )));
        }
        let emulator = format!("{PREFIX}{}", qemu_name(&wanted.architecture));
        Ok(match self.find(&emulator) {
            Some(found) => Means::Emulator(found),
            None => Means::None {
                platform: wanted.to_string(),
                emulator,
            },
        })
    }

    fn find(&self, name: &str) -> Option<PathBuf> {
        // The architecture comes from a client.
        if name.contains('/') {
            return None;
        }
        let dirs = std::env::split_paths(self.path.as_ref()?).filter(|dir| dir.is_absolute());
        dirs.map(|dir| dir.join(name)).find(|file| {
            file.metadata()
                .is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
        })
    }
}

/// What QEMU calls an architecture.
fn qemu_name(architecture: &str) -> &str {
    match architecture {
        "arm64" => "aarch64",
        "amd64" => "x86_64",
        "386" => "i386",
        other => other,
    }
}

impl Means {
    /// Puts a container under an emulator of the daemon's.
    pub(super) fn apply(&self, request: &mut RunRequest) {
        let Self::Emulator(emulator) = self else { return };
        request.process.args.insert(0, TARGET.to_owned());
        request.mounts.push(ContainerMount {
            target: TARGET.to_owned(),
            source: MountSource::Host(emulator.clone()),
            selector: String::new(),
            read_only: true,
        });
    }

    /// Tells of a step that failed whether that may be for want of an emulator: an OCI runtime has no error of its own for it.
    pub(super) fn tell(&self, progress: &VertexProgress) {
        if let Some(hint) = self.hint() {
            progress.log(LogStream::Stderr, format!("{hint}\n"));
        }
    }

    fn hint(&self) -> Option<String> {
        let Self::None { platform, emulator } = self else {
            return None;
        };
        Some(format!(
            "this machine does not run {platform} programs: no emulator for them is registered with binfmt_misc, and there \
             is no {emulator}"
        ))
    }

    /// Says of a failure that it is for want of an emulator, if so.
    pub(super) fn explain(&self, error: RunError) -> RunError {
        match (self.hint(), error) {
            (Some(hint), RunError::Start { message })
                if message.to_ascii_lowercase().contains("exec format error") =>
            {
                RunError::Start {
                    message: format!("{message}: {hint}"),
                }
            }
            (_, error) => error,
        }
    }
}

#[cfg(test)]
mod tests {
    use executor::{Process, Root};

    use super::*;

    fn platform(text: &str) -> pb::Platform {
        pb::Platform::from(&Platform::parse(text).expect("is a platform"))
    }

    fn emulators(path: Option<OsString>) -> Emulators {
        let runs = ["linux/amd64", "linux/amd64/v2", "linux/386", "linux/arm64"];
        let runs = runs.map(|text| Platform::parse(text).expect("is a platform"));
        Emulators::new(&runs, path)
    }

    #[test]
    fn the_kernel_runs_what_it_knows() {
        let emulators = emulators(None);
        for known in [
            "linux/amd64",
            "linux/amd64/v2",
            "linux/386",
            "linux/arm64",
            "linux/arm/v6",
        ] {
            assert_eq!(
                emulators.means(Some(&platform(known))).expect("is fine"),
                Means::Kernel,
                "{known}"
            );
        }
        assert_eq!(emulators.means(None).expect("is fine"), Means::Kernel);
        let error = emulators.means(Some(&platform("linux/amd64/v3"))).unwrap_err();
        assert_eq!(
            error.to_string(),
            "no support for running processes with linux/amd64/v3 platform, supported: linux/amd64, linux/amd64/v2"
        );
    }

    #[test]
    fn an_emulator_is_looked_for_and_its_want_is_told() {
        let dir = tempfile::tempdir().expect("makes a directory");
        let emulators = emulators(Some(std::env::join_paths([dir.path()]).expect("is a path")));
        let s390x = platform("linux/s390x");
        let file = dir.path().join("buildkit-qemu-s390x");
        std::fs::write(&file, "").expect("writes");
        let missing = emulators.means(Some(&s390x)).expect("is fine");
        let failed = |message: &str| RunError::Start {
            message: message.to_owned(),
        };
        let told = missing
            .explain(failed("exec /bin/sh: Exec format error"))
            .to_string();
        assert!(
            told.contains("does not run linux/s390x programs") && told.contains("no buildkit-qemu-s390x"),
            "{told}"
        );
        assert_eq!(missing.explain(failed("another")).to_string(), "another");

        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).expect("is ours");
        let found = emulators.means(Some(&s390x)).expect("is fine");
        assert_eq!(found, Means::Emulator(file));
        let process = Process {
            args: vec!["/bin/sh".to_owned()],
            env: Vec::new(),
            cwd: String::new(),
            user: String::new(),
            tty: false,
        };
        let mut request = RunRequest::new(Root::default(), process);
        found.apply(&mut request);
        assert_eq!(request.process.args, [TARGET, "/bin/sh"]);
        assert!(request.mounts[0].read_only && request.mounts[0].target == TARGET);
    }

    #[test]
    fn names_do_not_lead_anywhere_else() {
        let dir = tempfile::tempdir().expect("makes a directory");
        std::fs::create_dir(dir.path().join("buildkit-qemu-x")).expect("makes one more");
        let file = dir.path().join("evil");
        std::fs::write(&file, "").expect("writes");
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).expect("is ours");
        let emulators = emulators(Some(std::env::join_paths([dir.path()]).expect("is a path")));
        let hostile = pb::Platform {
            os: "linux".to_owned(),
            architecture: "x/../evil".to_owned(),
            ..Default::default()
        };
        let means = emulators.means(Some(&hostile)).expect("is fine");
        assert!(matches!(means, Means::None { .. }), "{means:?}");
    }
}

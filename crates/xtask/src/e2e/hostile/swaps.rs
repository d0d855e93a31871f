//! Directories that turn into links and back while something is done in them.

use anyhow::{Result, ensure};
use llb::pb;

use super::client::{name, request};
use super::ops::{definition, exec, image, mount};
use super::yard::{MARK, Yard};
use crate::e2e::fixture::Lab;

/// How often the directory is swapped; the others must be done before.
const SWAPS: usize = 600;
/// How often it is used meanwhile, in each of two ways.
const USES: usize = 6;

/// The cache that all steps share.
fn shared(cache: &str, dest: &str) -> pb::Mount {
    pb::Mount {
        cache_opt: Some(pb::CacheOpt {
            id: cache.to_owned(),
            sharing: pb::CacheSharingOpt::Shared.into(),
        }),
        ..mount(pb::MountType::Cache, dest)
    }
}

/// A step that makes `d` a directory, a link to the outside, a directory and so on.
fn swapping(lab: &Lab, cache: &str) -> pb::Definition {
    let outside = lab.dir().join("outside/dir");
    let script = format!(
        "cd /c; i=0; while [ $i -lt {SWAPS} ]; do rm -rf d; ln -s {0} d; rm d; ln -s ../../../../../../..{0} d; rm d; mkdir d; i=$((i+1)); done",
        outside.display()
    );
    let base = image(&lab.busybox());
    let step = exec(&[&base], &script, |exec, _| exec.mounts.push(shared(cache, "/c")));
    definition(&[base, step])
}

/// A step that has `d` itself as a mount.
fn mounting(lab: &Lab, cache: &str) -> pb::Definition {
    let base = image(&lab.busybox());
    let script = format!("touch /m/{}", name(MARK));
    let step = exec(&[&base], &script, |exec, _| {
        exec.mounts.push(pb::Mount {
            selector: "d".to_owned(),
            ..shared(cache, "/m")
        });
    });
    definition(&[base, step])
}

/// A step with a mount in `d`, for which a directory has to be made there.
fn mounting_in(lab: &Lab, cache: &str) -> pb::Definition {
    let base = image(&lab.busybox());
    let made = name(MARK);
    let step = exec(&[&base], "true", |exec, _| {
        exec.mounts.push(shared(cache, "/c"));
        exec.mounts
            .push(mount(pb::MountType::Tmpfs, &format!("/c/d/{made}")));
    });
    definition(&[base, step])
}

/// Swaps and uses at once. A use may fail; what it must not do is to go outside.
pub fn run(lab: &Lab) -> Result<()> {
    let mut yard = Yard::open(lab)?;
    let cache = name("cache");
    let (mut done, mut early) = (0, 0);
    let swapped = std::thread::scope(|scope| {
        let client = &yard.client;
        let swapper = scope.spawn(|| client.solve(request(swapping(lab, &cache))));
        for _ in 0..USES {
            for definition in [mounting(lab, &cache), mounting_in(lab, &cache)] {
                early += usize::from(!swapper.is_finished());
                done += usize::from(client.solve(request(definition))?.is_ok());
            }
        }
        swapper
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    if let Err(status) = swapped {
        anyhow::bail!("the swapping step failed: {}", status.message());
    }
    ensure!(early > USES, "the swaps were over after {early} uses");
    ensure!(done > 0, "no use was in time");
    yard.is_unharmed()?;
    yard.close()
}

//! The main job through the embedded engine and the daemon.

use std::fs;
use std::process::Stdio;

use anyhow::{Result, ensure};

use super::fixture::{Lab, cached_steps, expect, expect_not, fail, succeed};
use super::{Need, Scenario};
use crate::shell::root;

/// This file's scenarios.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "embedded-example",
        needs: &[Need::Root],
        run: embedded_example,
    },
    Scenario {
        name: "embedded-two-at-once",
        needs: &[Need::Root],
        run: two_at_once,
    },
    Scenario {
        name: "instructions",
        needs: &[Need::Root],
        run: instructions,
    },
    Scenario {
        name: "run-mounts",
        needs: &[Need::Root],
        run: run_mounts,
    },
    Scenario {
        name: "secret-leaves-no-trace",
        needs: &[Need::Root],
        run: secret_leaves_no_trace,
    },
    Scenario {
        name: "sandbox-from-inside",
        needs: &[Need::Root],
        run: sandbox_from_inside,
    },
    Scenario {
        name: "runc-worker",
        needs: &[Need::Root, Need::Program("runc")],
        run: runc_worker,
    },
];

fn embedded_example(lab: &Lab) -> Result<()> {
    let context = root().join("examples/hello");
    let rootfs = lab.dir().join("rootfs");
    let id = lab.dir().join("iid");
    let metadata = lab.dir().join("metadata.json");
    let build = |more: &[String]| {
        let mut command = lab.cooper_build(&context);
        command
            .arg(format!(
                "--build-context=busybox=docker-image://{}",
                lab.busybox()
            ))
            .args(more);
        succeed(&mut command)
    };
    build(&[
        format!("--output=type=local,dest={}", rootfs.display()),
        format!("--metadata-file={}", metadata.display()),
    ])?;
    let result = fs::read_to_string(rootfs.join("usr/share/hello/result"))?;
    expect(&result, "Hi, Bela!")?;
    let oci = lab.dir().join("image.tar");
    let again = build(&[
        format!("--output=type=oci,dest={}", oci.display()),
        format!("--iidfile={}", id.display()),
        "--tag=example.test/hello:1".to_owned(),
    ])?;
    ensure!(
        cached_steps(&again) >= 6,
        "the second build was not cached:\n{again}"
    );
    expect(&fs::read_to_string(id)?, "sha256:")?;
    let shipped = succeed(lab.tool("tar")?.arg("-tf").arg(&oci))?;
    expect(&shipped, "index.json")?;
    expect(&fs::read_to_string(metadata)?, "{")
}

fn two_at_once(lab: &Lab) -> Result<()> {
    let context = lab.context(
        "c",
        &[(
            "Dockerfile",
            "FROM @BASE@\nRUN echo one > /one\nRUN echo two > /two\n",
        )],
    )?;
    let start = || {
        lab.cooper_build(&context)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
    };
    let (first, second) = (start()?, start()?);
    for child in [first, second] {
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "{}", super::fixture::text(&output));
    }
    let third = succeed(&mut lab.cooper_build(&context))?;
    ensure!(cached_steps(&third) == 2, "{third}");
    Ok(())
}

const INSTRUCTIONS: &str = r#"# escape=`
ARG BASE=@BASE@
FROM ${BASE} AS one
SHELL ["/bin/sh", "-ec"]
ARG WHO=world
ENV GREETING="hello ${WHO}" `
    OTHER=x
WORKDIR /work/here
COPY --chmod=0640 --chown=1:2 a.txt b*.txt ./
ADD archive.tar /unpacked/
RUN [ "$(stat -c %a:%u:%g a.txt)" = 640:1:2 ] && [ "$(cat /unpacked/inside)" = inside ]
RUN ["/bin/sh", "-c", "echo exec form > /exec"]
COPY <<one.txt <<"two.txt" /heredocs/
$GREETING
one.txt
$GREETING
two.txt
RUN grep -qx 'hello world' /heredocs/one.txt && grep -qx '$GREETING' /heredocs/two.txt
USER 1000:1000
RUN [ "$(id -u):$(id -g)" = 1000:1000 ]
USER root
ONBUILD RUN echo onbuild > /onbuild

FROM one
LABEL a=b "c d"="e f"
EXPOSE 80/tcp 53/udp
VOLUME /data
STOPSIGNAL SIGINT
HEALTHCHECK --interval=5s --retries=2 CMD true
CMD ["sh", "-c", "echo $GREETING"]
ENTRYPOINT ["/bin/sh"]
RUN [ "$PWD" = /work/here ] && [ -f b1.txt ] && [ ! -e secret.env ]
COPY . /all/
RUN [ ! -e /all/secret.env ] && [ -e /all/keep.env ]
"#;

fn instructions(lab: &Lab) -> Result<()> {
    let context = lab.context(
        "c",
        &[
            ("Dockerfile", INSTRUCTIONS),
            (".dockerignore", "*.env\n!keep.env\n"),
            ("a.txt", "a"),
            ("b1.txt", "b"),
            ("secret.env", "no"),
            ("keep.env", "yes"),
            ("inside", "inside"),
        ],
    )?;
    succeed(
        lab.tool("tar")?
            .arg("-cf")
            .arg(context.join("archive.tar"))
            .arg("-C")
            .arg(&context)
            .arg("inside"),
    )?;
    let rootfs = lab.dir().join("rootfs");
    succeed(
        lab.cooper_build(&context)
            .arg(format!("--output=type=local,dest={}", rootfs.display())),
    )?;
    expect(&fs::read_to_string(rootfs.join("exec"))?, "exec form")?;
    ensure!(
        rootfs.join("onbuild").exists(),
        "a stage on top of one with ONBUILD runs its triggers"
    );
    Ok(())
}

const MOUNTS: &str = r#"FROM @BASE@ AS tools
RUN echo tool > /tool
FROM @BASE@
RUN --mount=type=bind,from=tools,source=/tool,target=/mnt/tool cat /mnt/tool > /copied && ! (echo x > /mnt/tool)
RUN --mount=type=cache,target=/cache echo kept >> /cache/log
RUN --mount=type=cache,target=/cache grep kept /cache/log && ! [ -e /cache/log2 ]
RUN --mount=type=tmpfs,target=/scratch,size=1m echo x > /scratch/x && df -k /scratch | grep -q 1024
RUN --mount=type=secret,id=token,required=true [ "$(cat /run/secrets/token)" = canary-secret ]
RUN --mount=type=secret,id=token,env=TOKEN [ "$TOKEN" = canary-secret ]
RUN --mount=type=secret,id=absent [ ! -e /run/secrets/absent ]
RUN --mount=type=bind,target=/ctx [ -f /ctx/Dockerfile ]
RUN [ ! -e /scratch/x ] && [ ! -e /run/secrets/token ] && [ ! -e /cache/log ]
"#;

fn run_mounts(lab: &Lab) -> Result<()> {
    let context = lab.context("c", &[("Dockerfile", MOUNTS)])?;
    let secret = lab.dir().join("token");
    fs::write(&secret, "canary-secret")?;
    let daemon = lab.daemon()?;
    let rootfs = lab.dir().join("rootfs");
    succeed(
        daemon
            .cooper_build(&context)
            .arg(format!("--secret=id=token,src={}", secret.display()))
            .arg(format!("--output=type=local,dest={}", rootfs.display())),
    )?;
    expect(&fs::read_to_string(rootfs.join("copied"))?, "tool")?;
    for stub in ["mnt", "run/secrets", "ctx", "scratch"] {
        ensure!(
            !rootfs.join(stub).exists(),
            "the mount point /{stub} was left in the image"
        );
    }
    Ok(())
}

/// Secrets as files and variables, in steps that succeed, fail and are asked again; none of it shows them.
const SECRETIVE: &str = r#"FROM @BASE@
RUN --mount=type=secret,id=k wc -c < /run/secrets/k > /size
RUN --mount=type=secret,id=k,env=TOKEN --mount=type=secret,id=k,target=/given,uid=11,gid=12,mode=0440 \
    [ "$TOKEN" = "$(cat /given)" ] && [ "$(stat -c '%u %g %a' /given)" = '11 12 440' ] && echo ${#TOKEN} > /length
"#;
const CANARY: &str = "canary-9d1f7c52";

fn secret_leaves_no_trace(lab: &Lab) -> Result<()> {
    let context = lab.context("c", &[("Dockerfile", SECRETIVE)])?;
    let failing = format!("{SECRETIVE}RUN --mount=type=secret,id=k,env=TOKEN test -z $TOKEN\n");
    let failing = lab.context("f", &[("Dockerfile", &failing)])?;
    let (out, socket) = (lab.dir().join("out.tar"), lab.dir().join("otel.sock"));
    let daemon = lab.daemon_with(&["--debug", &format!("--otel-socket-path={}", socket.display())])?;
    let build = |context: &std::path::Path, value: &str| {
        let mut build = daemon.cooper_build(context);
        build
            .env("KEY", value)
            .args(["--secret=id=k,env=KEY", "--explain"]);
        build
    };
    let mut first = build(&context, CANARY);
    first
        .arg("--provenance=mode=max")
        .arg(format!("--output=type=oci,dest={}", out.display()));
    let progress = succeed(&mut first)?;
    // Another value is no reason to run a step again.
    let again = succeed(&mut build(&context, &format!("{CANARY}-other")))?;
    ensure!(cached_steps(&again) >= 2, "{again}");
    let (_, failed) = fail(&mut build(&failing, CANARY))?;
    let history = succeed(&mut daemon.buildctl(&["debug", "histories"]))?;
    for shown in [&progress, &again, &failed, &history] {
        expect_not(shown, CANARY)?;
    }
    drop(daemon);
    // The canary would be found.
    fs::write(lab.dir().join("daemon/check"), CANARY)?;
    let found = lab
        .tool("grep")?
        .args(["-rl", CANARY])
        .arg(lab.dir().join("daemon"))
        .arg(&out)
        .output()?;
    let found = String::from_utf8_lossy(&found.stdout).into_owned();
    ensure!(
        found.trim_end().ends_with("daemon/check") && found.lines().count() == 1,
        "the secret is in {found}"
    );
    expect_not(&fs::read_to_string(lab.dir().join("daemon.log"))?, CANARY)
}

const SANDBOX: &str = r#"FROM @BASE@
RUN grep -q '^NoNewPrivs:.*0' /proc/self/status || true
RUN grep -q '^Seccomp:.*2' /proc/self/status
RUN ! mount -t tmpfs none /mnt 2>/dev/null
RUN ! cat /proc/kcore 2>/dev/null
RUN ! (echo 1 > /proc/sys/kernel/sysrq) 2>/dev/null
RUN [ "$(ls /proc/self/fd | wc -l)" -le 4 ]
RUN [ "$(cat /proc/1/comm)" = sh ] || [ "$(cat /proc/1/comm)" = cat ]
RUN mknod /sda b 8 0 && ! head -c 1 /sda 2>/dev/null; rm -f /sda
RUN --network=none ! ip route | grep -q default
"#;

fn sandbox_from_inside(lab: &Lab) -> Result<()> {
    let context = lab.context("c", &[("Dockerfile", SANDBOX)])?;
    succeed(&mut lab.cooper_build(&context))?;
    let refused = lab.context(
        "refused",
        &[("Dockerfile", "FROM @BASE@\nRUN --security=insecure true\n")],
    )?;
    let (_, message) = fail(&mut lab.cooper_build(&refused))?;
    expect(&message, "security.insecure")
}

fn runc_worker(lab: &Lab) -> Result<()> {
    let context = lab.context(
        "c",
        &[("Dockerfile", "FROM @BASE@\nRUN echo by runc > /x\nRUN cat /x\n")],
    )?;
    let daemon = lab.daemon_with(&["--oci-worker-binary=runc"])?;
    let progress = succeed(&mut daemon.buildctl_build(&context))?;
    expect(&progress, "by runc")
}

//! What steps find in their containers: users, caches, devices.

use std::fs;
use std::process::Command;

use anyhow::{Result, ensure};
use prost::Message as _;

use super::fixture::{Lab, expect, fail, succeed};
use super::hostile::ops::{definition, exec, image};
use super::{Need, Scenario};

/// This file's scenarios.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "owners-by-name",
        needs: &[Need::Root],
        run: owners_by_name,
    },
    Scenario {
        name: "cache-mount-without-cache",
        needs: &[Need::Root],
        run: cache_mount_without_cache,
    },
    Scenario {
        name: "devices",
        needs: &[Need::Root],
        run: devices,
    },
    Scenario {
        name: "devices-with-runc",
        needs: &[Need::Root, Need::Program("runc")],
        run: devices_with_runc,
    },
    Scenario {
        name: "trace-socket",
        needs: &[Need::Root],
        run: trace_socket,
    },
    Scenario {
        name: "trace-socket-with-runc",
        needs: &[Need::Root, Need::Program("runc")],
        run: trace_socket_with_runc,
    },
];

const OWNERS: &str = r#"FROM @BASE@
RUN echo 'user:x:1234:2345::/home/user:/bin/sh' >> /etc/passwd; echo 'user:x:2345:' >> /etc/group
RUN mkdir /there && chown user:user /there
ENV OWNER=user
ARG GROUP=user
COPY --chown=user:user a /by-name/
COPY --chown=${OWNER}:${GROUP} . /by-variable
COPY --chown=1234 a /by-number/
RUN [ "$(stat -c '%U %G' /by-name /by-name/a /by-variable /by-variable/a | sort -u)" = "user user" ]
RUN [ "$(stat -c '%u %g' /by-number/a)" = "1234 1234" ]
WORKDIR /there
RUN [ "$(stat -c '%U %G' /there)" = "user user" ]
USER user
WORKDIR /mine/below
RUN [ "$(stat -c '%U %G' /mine /mine/below | sort -u)" = "user user" ] && touch x
"#;

fn owners_by_name(lab: &Lab) -> Result<()> {
    let context = lab.context("c", &[("Dockerfile", OWNERS), ("a", "a")])?;
    succeed(&mut lab.cooper_build(&context)).map(drop)
}

const CACHED: &str = "FROM @BASE@
ARG MARK
RUN --mount=type=cache,target=/cache,mode=0773 touch /cache/$MARK && ls /cache | tr '\\n' ' ' && stat -c %a /cache
";

fn cache_mount_without_cache(lab: &Lab) -> Result<()> {
    let context = lab.context("c", &[("Dockerfile", CACHED)])?;
    let build = |mark: &str, flags: &[&str]| {
        let mut command = lab.cooper_build(&context);
        succeed(command.arg(format!("--build-arg=MARK={mark}")).args(flags))
    };
    expect(&build("one", &[])?, "one 773")?;
    expect(&build("two", &["--no-cache"])?, " two 773")?;
    let third = build("three", &[])?;
    ensure!(
        third.contains(" three two 773") && !third.contains("one three"),
        "{third}"
    );
    Ok(())
}

const SPECIFICATION: &str = "cdiVersion: 0.6.0
kind: example.test/device
annotations:
  org.mobyproject.buildkit.device.autoallow: true
devices:
- name: zero
  annotations:
    org.mobyproject.buildkit.device.class: zeros
  containerEdits:
    env: [GIVEN=zero]
    deviceNodes: [{path: /dev/given/zero, hostPath: /dev/zero, permissions: rw}]
";

/// What a labs version of the Dockerfile frontend makes of `RUN --device`.
fn with_devices(lab: &Lab) -> llb::pb::Definition {
    let steps: [(&[(&str, bool)], &str); 4] = [
        (
            &[("example.test/device=zero", false)],
            "[ $GIVEN = zero ] && [ $(head -c 3 /dev/given/zero | wc -c) = 3 ]",
        ),
        (&[("zeros", false)], "[ $GIVEN = zero ]"),
        (&[], "[ -z $GIVEN ] && [ ! -e /dev/given ]"),
        (&[("other.test/device", true)], "true"),
    ];
    let mut all = vec![image(&lab.busybox())];
    for (devices, script) in steps {
        let step = exec(
            &all[all.len() - 1..].iter().collect::<Vec<_>>(),
            script,
            |exec, _| {
                let device = |&(name, optional): &(&str, bool)| llb::pb::CdiDevice {
                    name: name.to_owned(),
                    optional,
                };
                exec.cdi_devices = devices.iter().map(device).collect();
            },
        );
        all.push(step);
    }
    definition(&all)
}

fn devices(lab: &Lab) -> Result<()> {
    check_devices(lab, &[])
}

fn devices_with_runc(lab: &Lab) -> Result<()> {
    check_devices(lab, &["--oci-worker-binary=runc"])
}

fn check_devices(lab: &Lab, flags: &[&str]) -> Result<()> {
    let specifications = lab.dir().join("cdi");
    fs::create_dir(&specifications)?;
    let dir = format!("--cdi-spec-dir={}", specifications.display());
    let daemon = lab.daemon_with(&[&[dir.as_str()], flags].concat())?;
    let file = lab.dir().join("definition");
    fs::write(&file, with_devices(lab).encode_to_vec())?;
    let build = |flags: &[&str]| -> Result<Command> {
        let mut build = daemon.buildctl(&["build", "--progress=plain"]);
        build.args(flags).stdin(fs::File::open(&file)?);
        Ok(build)
    };
    let (_, message) = fail(&mut build(&[])?)?;
    expect(
        &message,
        "required device \"example.test/device=zero\" is not registered",
    )?;
    // Found without a restart; a broken neighbour does not matter.
    fs::write(specifications.join("a.yaml"), "}{")?;
    fs::write(specifications.join("b.yaml"), SPECIFICATION)?;
    succeed(&mut build(&[])?)?;
    let workers = succeed(&mut daemon.buildctl(&["debug", "workers", "--verbose"]))?;
    expect(&workers, "example.test/device=zero")?;
    // Without the annotation it needs the right.
    fs::write(
        specifications.join("b.yaml"),
        SPECIFICATION.replace("autoallow: true", "autoallow: false"),
    )?;
    let (_, message) = fail(&mut build(&["--no-cache"])?)?;
    expect(
        &message,
        "device example.test/device=zero is requested by the build but not allowed",
    )?;
    succeed(&mut build(&["--no-cache", "--allow=device=example.test/device"])?)?;
    // The built-in frontend is no labs version.
    let context = lab.context("c", &[("Dockerfile", "FROM @BASE@\nRUN --device=zeros true\n")])?;
    let (_, message) = fail(&mut daemon.cooper_build(&context))?;
    expect(
        &message,
        "device feature is only supported in Dockerfile frontend 1.14.0-labs or later",
    )
}

const WITH_SOCKET: &str = "FROM @BASE@
RUN [ -S /dev/otel-grpc.sock ] && echo \"exporter $OTEL_TRACES_EXPORTER parent $TRACEPARENT.\"
ENV OTEL_TRACES_EXPORTER=none
RUN echo \"exporter $OTEL_TRACES_EXPORTER at $OTEL_EXPORTER_OTLP_TRACES_ENDPOINT\"
";
const WITHOUT_SOCKET: &str = "FROM @BASE@
RUN [ ! -e /dev/otel-grpc.sock ] && [ -z $TRACEPARENT$OTEL_TRACES_EXPORTER ]
";

fn trace_socket(lab: &Lab) -> Result<()> {
    check_trace_socket(lab, &[])
}

fn trace_socket_with_runc(lab: &Lab) -> Result<()> {
    check_trace_socket(lab, &["--oci-worker-binary=runc"])
}

fn check_trace_socket(lab: &Lab, flags: &[&str]) -> Result<()> {
    let socket = lab.dir().join("otel.sock");
    let flag = format!("--otel-socket-path={}", socket.display());
    let daemon = lab.daemon_with(&[&[flag.as_str()], flags].concat())?;
    let context = lab.context("c", &[("Dockerfile", WITH_SOCKET)])?;
    let shown = succeed(&mut daemon.cooper_build(&context))?;
    expect(&shown, "exporter otlp parent 00-")?;
    expect(&shown, "exporter none at unix:///dev/otel-grpc.sock")?;
    // What differs in each build does not count as a difference.
    expect(&succeed(&mut daemon.cooper_build(&context))?, "CACHED")?;
    // A second daemon does not take the socket away, and says so.
    let mut second = lab.command("cooperd");
    second
        .args([flag.as_str(), "--root"])
        .arg(lab.dir().join("second"));
    let address = format!("unix://{}", lab.dir().join("second.sock").display());
    let (_, message) = fail(second.args(["--addr", &address]))?;
    expect(&message, "failed to listen for spans at")?;
    ensure!(socket.exists(), "the second daemon removed the socket");
    drop(daemon);
    let plain = lab.context("p", &[("Dockerfile", WITHOUT_SOCKET)])?;
    succeed(&mut lab.cooper_build(&plain)).map(drop)
}

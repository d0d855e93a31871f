//! What comes out: archives, directories, images, and nothing.

use std::fs;

use anyhow::{Result, ensure};

use super::fixture::{Lab, expect, expect_not, succeed};
use super::{Need, Scenario};

/// This file's scenarios.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "export-oci-docker-tar-local",
        needs: &[Need::Root],
        run: archives,
    },
    Scenario {
        name: "export-is-reproducible",
        needs: &[Need::Root],
        run: reproducible,
    },
    Scenario {
        name: "multi-platform-index",
        needs: &[Need::Root],
        run: multi_platform,
    },
    Scenario {
        name: "cache-only",
        needs: &[Need::Root],
        run: cache_only,
    },
];

const DOCKERFILE: &str = "FROM @BASE@\nRUN mkdir /d && echo x > /d/x && ln /d/x /d/y && ln -s x /d/z && chmod 4755 /d/x\nRUN rm /d/y /bin/vi\nCMD [\"true\"]\n";

fn archives(lab: &Lab) -> Result<()> {
    let context = lab.context("c", &[("Dockerfile", DOCKERFILE)])?;
    let daemon = lab.daemon()?;
    let export = |spec: &str| succeed(daemon.buildctl_build(&context).arg(format!("--output={spec}")));
    let list = |archive: &std::path::Path| succeed(lab.tool("tar")?.arg("-tf").arg(archive));
    let at = |name: &str| lab.dir().join(name);
    export(&format!("type=oci,dest={}", at("oci.tar").display()))?;
    expect(&list(&at("oci.tar"))?, "oci-layout")?;
    export(&format!(
        "type=docker,name=a.test/b:c,dest={}",
        at("docker.tar").display()
    ))?;
    expect(&list(&at("docker.tar"))?, "manifest.json")?;
    export(&format!("type=tar,dest={}", at("root.tar").display()))?;
    let listed = list(&at("root.tar"))?;
    expect(&listed, "d/x")?;
    expect_not(&listed, "d/y")?;
    expect_not(&listed, "bin/vi\n")?;
    export(&format!("type=local,dest={}", at("local").display()))?;
    ensure!(
        fs::read_link(at("local").join("d/z"))?.as_os_str() == "x",
        "the link was not kept"
    );
    ensure!(!at("local").join("bin/vi").exists(), "a removed file came back");
    export(&format!("type=oci,tar=false,dest={}", at("layout").display()))?;
    expect(&fs::read_to_string(at("layout").join("index.json"))?, "sha256:")
}

fn reproducible(lab: &Lab) -> Result<()> {
    let context = lab.context(
        "c",
        &[("Dockerfile", "FROM @BASE@\nCOPY a.txt /a\n"), ("a.txt", "a")],
    )?;
    let mut digests = Vec::new();
    let daemon = lab.daemon()?;
    for round in 0..2 {
        let metadata = lab.dir().join(format!("m{round}.json"));
        let mut build = daemon.buildctl_build(&context);
        build.arg("--opt=build-arg:SOURCE_DATE_EPOCH=1700000000");
        build.arg(format!(
            "--output=type=oci,rewrite-timestamp=true,dest={}",
            lab.dir().join("o.tar").display()
        ));
        succeed(build.arg(format!("--metadata-file={}", metadata.display())))?;
        let text = fs::read_to_string(metadata)?;
        let digest = text
            .split("\"containerimage.digest\": \"")
            .nth(1)
            .and_then(|rest| rest.split('"').next());
        digests.push(digest.unwrap_or("none").to_owned());
        succeed(&mut daemon.buildctl(&["prune", "--all"]))?;
    }
    ensure!(
        digests[0].starts_with("sha256:") && digests[0] == digests[1],
        "{digests:?}"
    );
    Ok(())
}

fn multi_platform(lab: &Lab) -> Result<()> {
    let context = lab.context(
        "c",
        &[
            (
                "Dockerfile",
                "FROM scratch\nARG TARGETARCH\nCOPY a.txt /$TARGETARCH\n",
            ),
            ("a.txt", "a"),
        ],
    )?;
    let daemon = lab.daemon()?;
    let out = lab.dir().join("out");
    let mut build = daemon.buildctl_build(&context);
    build.arg("--opt=platform=linux/amd64,linux/arm64");
    succeed(build.arg(format!("--output=type=local,dest={}", out.display())))?;
    ensure!(
        out.join("linux_amd64/amd64").is_file() && out.join("linux_arm64/arm64").is_file(),
        "a platform is missing"
    );
    Ok(())
}

fn cache_only(lab: &Lab) -> Result<()> {
    let context = lab.context("c", &[("Dockerfile", DOCKERFILE)])?;
    let daemon = lab.daemon()?;
    let progress = succeed(&mut daemon.buildctl_build(&context))?;
    expect_not(&progress, "exporting")
}

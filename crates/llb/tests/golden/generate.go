// Prints what the Go client of BuildKit makes of some constructions; go_client.json is its output.
// Run it in a checkout of github.com/moby/buildkit: go run ./cmd/generate
package main

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/moby/buildkit/client/llb"
	"github.com/moby/buildkit/client/llb/llbbuild"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/apicaps"
	digest "github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

type out struct {
	Name string
	Ops  []string
	Meta map[string]json.RawMessage
	Source json.RawMessage
}

func main() {
	ctx := context.Background()
	amd := ocispecs.Platform{OS: "linux", Architecture: "amd64"}
	arm := ocispecs.Platform{OS: "linux", Architecture: "arm", Variant: "v7"}
	var outs []out
	add := func(name string, st llb.State, co ...llb.ConstraintsOpt) {
		co = append([]llb.ConstraintsOpt{llb.Platform(amd), llb.LocalUniqueID("unique")}, co...)
		def, err := st.Marshal(ctx, co...)
		if err != nil {
			panic(name + ": " + err.Error())
		}
		p := def.ToPB()
		o := out{Name: name, Meta: map[string]json.RawMessage{}}
		for _, d := range p.Def {
			o.Ops = append(o.Ops, base64.StdEncoding.EncodeToString(d))
		}
		for k, v := range p.Metadata {
			b, _ := json.Marshal(v)
			o.Meta[k] = b
		}
		o.Source, _ = json.Marshal(p.Source)
		outs = append(outs, o)
	}
	alpine := llb.Image("alpine")
	add("image", alpine)
	add("image-options", llb.Image("docker.io/library/busybox:1.36", llb.ResolveModeForcePull, llb.MarkImageInternal, llb.WithLayerLimit(5), llb.WithImageChecksum(digest.FromString("x")), llb.Platform(arm), llb.WithCustomName("named")))
	add("image-prefer-local", llb.Image("a/b@"+digest.FromString("x").String(), llb.ResolveModePreferLocal))
	add("local", llb.Local("context"))
	add("local-options", llb.Local("context", llb.SessionID("s1"), llb.IncludePatterns([]string{"a<b>", "c&d"}), llb.ExcludePatterns([]string{"e"}), llb.FollowPaths([]string{"f"}), llb.SharedKeyHint("hint"), llb.Differ(llb.DiffNone, true), llb.MetadataOnlyTransfer([]string{"m"}), llb.WithCustomName("load")))
	add("http", llb.HTTP("https://example.com/f", llb.Checksum(digest.FromString("y")), llb.Filename("n"), llb.Chmod(0640), llb.Chown(1, 2), llb.AuthHeaderSecret("sec"), llb.Header(llb.HTTPHeader{Accept: "x", UserAgent: "y"})))
	add("http-plain", llb.HTTP("https://example.com/f"))
	add("http-signature", llb.HTTP("https://example.com/f", llb.VerifyPGPSignature(llb.HTTPSignatureInfo{PubKey: []byte("k"), Signature: []byte("s")})))
	add("git", llb.Git("https://github.com/moby/buildkit.git", "v1:sub/dir"))
	add("git-short", llb.Git("github.com/moby/buildkit.git", ""))
	add("git-ssh", llb.Git("git@github.com:moby/buildkit.git", "main", llb.KnownSSHHosts("hosts"), llb.MountSSHSock("sock")))
	add("git-options", llb.Git("https://u:p@host:8443/repo.git?x=y#frag", "", llb.GitRef("r"), llb.GitSubDir("s"), llb.KeepGitDir(), llb.GitSkipSubmodules(), llb.GitChecksum("0123456789012345678901234567890123456789"), llb.GitMTimeCommit(), llb.GitFetchByCommit(), llb.AuthTokenSecret("t"), llb.AuthHeaderSecret("h")))
	add("oci-layout", llb.OCILayout("x/y@"+digest.FromString("z").String(), llb.OCIStore("sess", "store"), llb.OCILayerLimit(3)))
	add("image-blob", llb.ImageBlob("a/b@"+digest.FromString("z").String(), llb.Filename("f"), llb.Chmod(0600), llb.Chown(3, 4)))
	add("oci-layout-blob", llb.OCILayoutBlob("a/b@"+digest.FromString("z").String(), llb.ImageBlobOCIStore("s", "t")))
	add("scratch", llb.Scratch())

	add("run", alpine.Run(llb.Args([]string{"echo", "hi"})).Root())
	add("run-settings", alpine.AddEnv("A", "1").AddEnv("B", "2").AddEnv("A", "3").Dir("/w").Dir("x/../y").User("me").Hostname("h").AddExtraHost("e", net.ParseIP("10.0.0.1")).AddUlimit("nofile", 1, 2).WithCgroupParent("cg").Network(llb.NetModeHost).Security(llb.SecurityModeInsecure).
		Run(llb.Args([]string{"sh", "-c", "x"}), llb.ValidExitCodes(0, 3), llb.WithProxy(llb.ProxyEnv{HTTPProxy: "a", HTTPSProxy: "b", FTPProxy: "c", NoProxy: "d", AllProxy: "e"}), llb.AddCDIDevice(llb.CDIDeviceName("v/d=1"), llb.CDIDeviceOptional), llb.IgnoreCache, llb.ProgressGroup("g", "group", true), llb.WithLinuxResources(llb.LinuxResources{Memory: 5, CPUShares: 6, CpusetCpus: "0"})).Root())
	busybox := llb.Image("busybox")
	es := alpine.Run(llb.Args([]string{"m"}),
		llb.AddMount("/z", busybox, llb.SourcePath("/bin"), llb.Readonly),
		llb.AddMount("/a", busybox),
		llb.AddMount("/b", llb.Scratch()),
		llb.AddMount("/c", llb.Scratch(), llb.AsPersistentCacheDir("id", llb.CacheMountLocked)),
		llb.AddMount("/d", busybox, llb.AsPersistentCacheDir("id2", llb.CacheMountPrivate), llb.SourcePath("x")),
		llb.AddMount("/e", llb.Scratch(), llb.Tmpfs(llb.TmpfsSize(1024))),
		llb.AddMount("/f", busybox, llb.ForceNoOutput, llb.ContentCache(llb.MountContentCacheOn)),
		llb.AddSecret("/run/secrets/s", llb.SecretID("sid"), llb.SecretOptional, llb.SecretFileOpt(1, 2, 0440)),
		llb.AddSecretWithDest("sid2", nil, llb.SecretAsEnvName("SECRET")),
		llb.AddSSHSocket(llb.SSHID("agent"), llb.SSHOptional),
		llb.AddSSHSocket(llb.SSHSocketOpt("/sock", 3, 4, 0666)),
	)
	add("mounts-root", es.Root())
	add("mounts-a", es.GetMount("/a"))
	add("mounts-b", es.GetMount("/b").Run(llb.Args([]string{"n"})).Root())
	add("mounts-z", es.GetMount("/z"))
	ro := alpine.Run(llb.Args([]string{"ro"}), llb.ReadonlyRootFS(), llb.AddMount("/out", llb.Scratch()))
	add("readonly", ro.GetMount("/out"))
	add("readonly-root", ro.Root())
	add("run-platform", llb.Image("alpine", llb.Platform(arm)).Run(llb.Args([]string{"p"})).Root())
	add("run-constraint-platform", alpine.Run(llb.Args([]string{"p"}), llb.Platform(arm)).Root().Run(llb.Args([]string{"q"})).Root())
	add("caps-known", alpine.Run(llb.Args([]string{"p"})).Root(), llb.WithCaps(pb.Caps.CapSet(pb.Caps.All())))
	add("caps-unknown", alpine.Run(llb.Args([]string{"p"})).Root(), llb.WithCaps((&apicaps.CapList{}).CapSet(nil)))

	created := time.Unix(1700000000, 5)
	add("mkdir", alpine.File(llb.Mkdir("/foo", 0755)))
	add("file-chain", alpine.Dir("/wd").File(llb.Mkdir("foo", 01777, llb.WithParents(true), llb.WithUser("me:7"), llb.WithCreatedTime(created)).Mkfile("foo/bar", 0600, []byte("data"), llb.WithUIDGID(0, 0)).Symlink("old", "new", llb.WithUser("root")).Rm("x*", llb.WithAllowNotFound(true), llb.WithAllowWildcard(true))))
	// The copy must have a mode for Go not to follow a nil pointer when it has actions to look at.
	add("copy", busybox.File(llb.Copy(alpine, "/etc/../x", "y/", &llb.CopyInfo{Mode: &llb.ChmodOpt{Mode: 0755}, FollowSymlinks: true, CopyDirContentsOnly: true, IncludePatterns: []string{"i"}, ExcludePatterns: []string{"e"}, RequiredPaths: []string{"r"}, AttemptUnpack: true, CreateDestPath: true, AllowWildcard: true, AllowEmptyWildcard: true, AlwaysReplaceExistingDestPaths: true, ChownOpt: &llb.ChownOpt{User: &llb.UserOpt{Name: "n"}}})))
	add("copy-dot", busybox.Dir("/d").File(llb.Copy(alpine.Dir("/s"), "a", "b/.").Copy(alpine, ".", ".").Copy(llb.Local("l"), "/", "/", &llb.CopyInfo{Mode: &llb.ChmodOpt{ModeStr: "u+x"}})))
	bound := llb.Mkdir("/m", 0700).Mkfile("/m/f", 0600, nil).WithState(llb.Image("debian").Dir("/q"))
	add("copy-actions", busybox.File(llb.Mkdir("/one", 0755).Copy(bound, "m", "/two").Copy(bound, "/m/f", "/three")))
	add("copy-scratch", llb.Scratch().File(llb.Copy(alpine, "/a", "/b")).File(llb.Copy(llb.Scratch(), "/a", "/b")))
	add("merge", llb.Merge([]llb.State{alpine, llb.Scratch(), busybox, alpine}))
	add("merge-one", llb.Merge([]llb.State{llb.Scratch(), busybox}))
	add("diff", llb.Diff(alpine, alpine.Run(llb.Args([]string{"d"})).Root()))
	add("diff-scratch", llb.Diff(alpine, llb.Scratch()))
	add("requires", alpine.Requires("id", busybox, llb.Scratch()))
	add("build", alpine.With(llbbuild.Build(llbbuild.WithFilename("f"))))
	add("build-default", alpine.With(llbbuild.Build()))
	sm := llb.NewSourceMap(nil, "Dockerfile", "Dockerfile", []byte("FROM x\n"))
	loc := func(l int32) llb.ConstraintsOpt {
		return sm.Location([]*pb.Range{{Start: &pb.Position{Line: l}, End: &pb.Position{Line: l}}})
	}
	base := llb.Image("alpine", loc(1))
	chained := base.Run(llb.Args([]string{"one"}), loc(2), llb.WithDescription(map[string]string{"a": "b"}), llb.WithExportCache()).Root()
	add("locations", llb.Merge([]llb.State{chained.Run(llb.Args([]string{"two"}), loc(3), llb.WithoutExportCache()).Root(), chained}, llb.IgnoreCache))
	def, err := chained.Marshal(ctx, llb.Platform(arm))
	if err != nil {
		panic(err)
	}
	op, err := llb.NewDefinitionOp(def.ToPB())
	if err != nil {
		panic(err)
	}
	add("imported", llb.NewState(op).Run(llb.Args([]string{"after"})).Root())
	cfg, _ := json.Marshal(map[string]any{"architecture": "arm64", "os": "linux", "config": map[string]any{"Env": []string{"P=1", "Q"}, "WorkingDir": "rel"}})
	st, err := alpine.WithImageConfig(cfg)
	if err != nil {
		panic(err)
	}
	add("image-config", st.Run(llb.Args([]string{"c"})).Root())
	enc := json.NewEncoder(os.Stdout)
	enc.SetIndent("", " ")
	if err := enc.Encode(outs); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
}

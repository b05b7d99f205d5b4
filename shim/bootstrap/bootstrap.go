// Package bootstrap is the command line of the shim: what containerd calls to
// start a shim, to clean up after a dead one and to ask what it is, and the
// supervisor itself.
//
// There is one supervisor for all pods and containers of one containerd and namespace,
// or one for each pod. It
// is found by its socket, whose name follows from containerd's address; beside it
// are its state directory and the lock under which it begins and ends. It outlives
// containerd and ends a little after its last container. Start reading at Main.
package bootstrap

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	api "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/containerd/v2/version"
	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/gantry-cri/gantry/shim/oci"
	"github.com/gantry-cri/gantry/shim/process"
	"github.com/gantry-cri/gantry/shim/sandbox"
	"github.com/gantry-cri/gantry/shim/statedir"
	"github.com/gantry-cri/gantry/shim/task"
)

// Name is the runtime_type of the shim. As PodName it has a supervisor for each pod,
// and for each container that is in none: more memory, and the end of one supervisor
// is the matter of one pod. The name says it because every containerd can give it.
const (
	Name    = "io.containerd.gantry.v2"
	PodName = "io.containerd.gantry-pod.v2"
)

// Main runs the command line.
func Main(ctx context.Context) {
	if len(os.Args) > 1 && os.Args[1] == serveCommand {
		os.Exit(serveMain(ctx, os.Args[2:]))
	}
	shim.RunShim(ctx, manager{perPod: filepath.Base(os.Args[0]) == shim.BinaryName(PodName)}, func(c *shim.Config) {
		// A command of moments; only the supervisor has children to reap.
		c.NoReaper, c.NoSubreaper = true, true
	})
}

// manager implements containerd's protocol for shims.
type manager struct {
	perPod bool // as PodName
}

var _ shim.Shim = manager{}

// Name implements shim.Shim.
func (m manager) Name() string {
	if m.perPod {
		return PodName
	}
	return Name
}

// promises tells a containerd that knows the words. Resumes: start, called again after
// the end of a supervisor, starts one that has its tasks and sandboxes; any other
// containerd takes the end of its connection for theirs. Shared: while it is connected
// it need not call start for more of them, but write their options into the bundle, as
// start does.
func (m manager) promises() map[string]string {
	said := map[string]string{"io.containerd.gantry.resumes": "true"}
	if !m.perPod {
		said["io.containerd.gantry.shared"] = "true"
	}
	return said
}

// oursEnv is set by our daemon (plugin/runtime/pool), which reads output that has no end.
const oursEnv = "GANTRY_DAEMON"

// Start implements shim.Shim: it returns where the supervisor listens, and
// starts it if it is not there.
func (m manager) Start(ctx context.Context, p *bootapi.BootstrapParams) (*bootapi.BootstrapResult, error) {
	dir := p.GetSocketDir()
	if dir == "" {
		dir = filepath.Join(defaults.DefaultStateDir, "s")
	}
	of := []string{p.GetContainerdGrpcAddress(), p.GetNamespace()}
	if m.perPod {
		of = append(of, p.GetInstanceID())
	}
	s := supervisor{
		socket:    filepath.Join(dir, socketName(of...)),
		namespace: p.GetNamespace(), address: p.GetContainerdGrpcAddress(), ttrpc: p.GetContainerdTtrpcAddress(),
		debug: p.GetLogLevel() <= bootapi.LogLevel_LOG_LEVEL_DEBUG,
		// Another containerd waits for the end of what it reads.
		relay: os.Getenv(oursEnv) == "",
		// The shim of one pod is where shims are.
		scoped: !m.perPod,
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	o, err := startOptions(p)
	if err != nil {
		return nil, err
	}
	if err := s.ensure(ctx, o.GetShimCgroup()); err != nil {
		return nil, err
	}
	if err := statedir.WriteAddress(".", s.url()); err != nil {
		return nil, err
	}
	return &bootapi.BootstrapResult{Version: 3, Protocol: "ttrpc", Address: s.url(), Metadata: m.promises()}, nil
}

// socketName is the same for all that one supervisor is for: a containerd and a
// namespace, and maybe a pod.
func socketName(of ...string) string {
	sum := sha256.Sum256([]byte(strings.Join(of, "\x00")))
	return "gantry-" + hex.EncodeToString(sum[:12])
}

// startOptions reads the options of a start, and leaves them in the bundle, which
// may be that of a sandbox.
func startOptions(p *bootapi.BootstrapParams) (*options.Options, error) {
	for _, e := range p.GetExtensions() {
		if !isOptions(e.GetValue()) {
			continue
		}
		o, err := oci.Options(e.GetValue())
		if err != nil {
			return nil, err
		}
		return o, oci.SaveOptions(".", e.GetValue())
	}
	return &options.Options{}, nil
}

func isOptions(a typeurl.Any) bool {
	return a != nil && strings.HasSuffix(a.GetTypeUrl(), "Options")
}

// dialLimit is how long a supervisor may take to accept a connection.
const dialLimit = 2 * time.Second

// Stop implements shim.Shim: it takes away what is left of a container whose
// supervisor died, and says how its first process ended.
func (manager) Stop(ctx context.Context, id string) (shim.StopStatus, error) {
	bundle := "."
	if o, ok := ctx.Value(shim.OptsKey{}).(shim.Opts); ok && o.BundlePath != "" {
		bundle = o.BundlePath
	}
	unknown := shim.StopStatus{ExitStatus: 128 + int(unix.SIGKILL), ExitedAt: time.Now()}
	address, err := statedir.ReadAddress(bundle)
	if errors.Is(err, os.ErrNotExist) {
		return unknown, nil // the supervisor has never heard of it
	}
	if err != nil {
		return unknown, err
	}
	ns, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return unknown, err
	}
	s := supervisor{socket: strings.TrimPrefix(address, "unix://")}
	exit, pid, err := s.forget(ctx, ns, id)
	if err != nil && !s.listens() {
		// It was about to be dead when it was asked.
		exit, pid, err = s.forget(ctx, ns, id)
	}
	if err != nil {
		return unknown, err
	}
	if err := s.removeEmpty(); err != nil {
		fmt.Fprintln(os.Stderr, err) // containerd logs it
	}
	return shim.StopStatus{Pid: pid, ExitStatus: exit.Code, ExitedAt: exit.At}, nil
}

// forget takes away what there is of a task or a sandbox, which a supervisor that is there
// does with what it has of it, and says how its first process ended.
func (s supervisor) forget(ctx context.Context, ns, id string) (process.Exit, int, error) {
	var tasks api.TTRPCTaskService
	var pods sandboxapi.TTRPCSandboxService
	if conn, err := s.dial(); err == nil {
		client := ttrpc.NewClient(conn)
		defer client.Close()
		tasks, pods = api.NewTTRPCTaskClient(client), sandboxapi.NewTTRPCSandboxClient(client)
	}
	exit, pid, err := task.Forget(ctx, ns, stateDir(s.socket), id, tasks)
	if err != nil {
		return exit, pid, err
	}
	// The ID may be that of a sandbox.
	return exit, pid, sandbox.Forget(ctx, sandbox.Options{Namespace: ns, State: podsDir(s.socket), TaskState: stateDir(s.socket)}, id, pods)
}

// Info implements shim.Shim.
func (m manager) Info(ctx context.Context, r io.Reader) (*types.RuntimeInfo, error) {
	info := &types.RuntimeInfo{
		Name: m.Name(), Version: &types.RuntimeVersion{Version: version.Version, Revision: version.Revision}, Annotations: m.promises(),
	}
	o, err := readOptions(r)
	if err != nil {
		return nil, err
	}
	if info.Options, err = typeurl.MarshalAnyToProto(o); err != nil {
		return nil, err
	}
	features, err := oci.Features(ctx, o)
	if errdefs.IsNotFound(err) {
		return nil, err
	}
	if err != nil {
		return info, nil // an older runtime cannot say
	}
	info.Features, err = typeurl.MarshalAnyToProto(features)
	return info, err
}

// readOptions reads the options of a question, none for a question without.
func readOptions(r io.Reader) (*options.Options, error) {
	data, err := io.ReadAll(io.LimitReader(r, maxOptions))
	if err != nil || len(data) == 0 {
		return &options.Options{}, err
	}
	var a anypb.Any
	if err := proto.Unmarshal(data, &a); err != nil {
		return nil, fmt.Errorf("read options: %w: %w", errdefs.ErrInvalidArgument, err)
	}
	return oci.Options(&a)
}

// maxOptions is far more than options take.
const maxOptions = 1 << 20

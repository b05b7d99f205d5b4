package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"strings"
	"syscall"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/operation"
)

const (
	// maxMessage is the size of an answer that the kubelet accepts too.
	maxMessage = 16 << 20
	// maxAnswer bounds what is read from the operations socket.
	maxAnswer = 64 << 20
)

// Ops asks a daemon what it is doing.
type Ops struct {
	socket string
	client *http.Client
}

// NewOps returns a client of the operations socket at that path.
func NewOps(socket string) *Ops {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}
	return &Ops{socket, &http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}}
}

// List returns what is under way, the oldest first.
func (o *Ops) List(ctx context.Context) ([]operation.Entry, error) {
	body, err := o.get(ctx, "/operations")
	if err != nil {
		return nil, err
	}
	var entries []operation.Entry
	if err := json.Unmarshal(body, &entries); err != nil {
		return nil, fmt.Errorf("read operations: the answer from %s is none of gantry's: %w", o.socket, err)
	}
	return entries, nil
}

// Stacks returns the stack of every goroutine of the daemon.
func (o *Ops) Stacks(ctx context.Context) (string, error) {
	body, err := o.get(ctx, "/stacks")
	return string(body), err
}

func (o *Ops) get(ctx context.Context, path string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://gantry"+path, nil)
	if err != nil {
		return nil, fmt.Errorf("ask daemon: %w", err)
	}
	resp, err := o.client.Do(req)
	if err != nil {
		return nil, explain("ask daemon", o.socket, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return nil, fmt.Errorf("ask daemon: read answer: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("ask daemon: %s answers %s to %s: is that gantry's socket?", o.socket, resp.Status, path)
	}
	return body, nil
}

// explain adds what to do about a socket that cannot be used.
func explain(verb, socket string, err error) error {
	hint := ""
	switch {
	case errors.Is(err, fs.ErrNotExist):
		hint = "there is no such socket: either the daemon has never run, or it runs without gantry or with another state directory (--state)"
	case errors.Is(err, fs.ErrPermission):
		hint = "only root may use it: try sudo"
	case errors.Is(err, syscall.ECONNREFUSED):
		hint = "nobody serves it: the daemon is down, start it"
	default:
		return fmt.Errorf("%s at %s: %w", verb, socket, err)
	}
	return fmt.Errorf("%s at %s: %s (%w)", verb, socket, hint, err)
}

// Pods is what a daemon says about itself over the CRI.
type Pods struct {
	// IDs of all pods and containers there are, those under way included.
	IDs map[string]bool
	// Conditions are the runtime's: RuntimeReady, NetworkReady.
	Conditions []*cri.RuntimeCondition
	// Version is the runtime's name and version.
	Version string
	// Partial says what could not be asked, "" for nothing.
	Partial string
}

// AskPods lists everything that has a right to be on the machine.
func AskPods(ctx context.Context, l Layout) (Pods, error) {
	address := strings.TrimPrefix(l.Address, "unix://")
	// gRPC would turn a missing socket into a wait and a text.
	probe, err := new(net.Dialer).DialContext(ctx, "unix", address)
	if err != nil {
		return Pods{}, explain("ask daemon", address, err)
	}
	probe.Close()
	conn, err := grpc.NewClient("unix://"+address, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)))
	if err != nil {
		return Pods{}, fmt.Errorf("ask daemon: %w", err)
	}
	defer conn.Close()
	return listPods(ctx, cri.NewRuntimeServiceClient(conn), NewOps(l.OpsSocket()))
}

// listPods asks for what is under way first: what ends meanwhile is in the
// lists that follow.
func listPods(ctx context.Context, rt cri.RuntimeServiceClient, ops *Ops) (Pods, error) {
	p := Pods{IDs: map[string]bool{}}
	underWay, err := ops.List(ctx)
	if err != nil {
		p.Partial = "what is being made just now is not known: " + err.Error()
	}
	for _, o := range underWay {
		p.IDs[o.ID] = true
	}
	v, err := rt.Version(ctx, &cri.VersionRequest{})
	if err != nil {
		return p, fmt.Errorf("ask daemon for its version: %w", err)
	}
	p.Version = v.RuntimeName + " " + v.RuntimeVersion
	status, err := rt.Status(ctx, &cri.StatusRequest{})
	if err != nil {
		return p, fmt.Errorf("ask daemon for its status: %w", err)
	}
	p.Conditions = status.GetStatus().GetConditions()
	pods, err := rt.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
	if err != nil {
		return p, fmt.Errorf("list pods: %w", err)
	}
	for _, sb := range pods.Items {
		p.IDs[sb.Id] = true
	}
	containers, err := rt.ListContainers(ctx, &cri.ListContainersRequest{})
	if err != nil {
		return p, fmt.Errorf("list containers: %w", err)
	}
	for _, c := range containers.Containers {
		p.IDs[c.Id] = true
	}
	return p, nil
}

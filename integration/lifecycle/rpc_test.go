package lifecycle

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"k8s.io/apimachinery/pkg/util/version"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
)

// unknownID has the form of an ID and is none.
const unknownID = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

func TestRPC_01_Version(t *testing.T) {
	d := shared(t)
	v, err := d.Runtime().Version(t.Context(), &cri.VersionRequest{Version: "0.1.0"})
	if err != nil {
		t.Fatal(err)
	}
	// As the kubelet reads it.
	parsed, err := version.ParseSemantic(v.RuntimeVersion)
	if err != nil || parsed.Major() < 2 {
		t.Errorf("runtime version %q: %v, %v", v.RuntimeVersion, parsed, err)
	}
	if v.Version != "0.1.0" || v.RuntimeName != "containerd" || v.RuntimeApiVersion != "v1" {
		t.Errorf("version is %v", v)
	}
	rt, _ := d.CRI()
	if again, err := rt.Version(t.Context(), "v1"); err != nil || again.RuntimeVersion != v.RuntimeVersion {
		t.Errorf("the kubelet's client gets %v, %v", again, err)
	}
}

// TestRPC_02_RunPodSandbox: a pod is whole when the call returns, and one that
// cannot be made leaves nothing, whichever half of it failed.
func TestRPC_02_RunPodSandbox(t *testing.T) {
	d := shared(t)
	p := runPaused(d, "whole")
	s := podStatus(t, d, p.id)
	if s.State != cri.PodSandboxState_SANDBOX_READY || !exists(ipamFile(d, s.Network.Ip)) || len(netnsMounts(t, d)) != 1 {
		t.Errorf("state %s, address %q, namespaces %q", s.State, s.Network.Ip, netnsMounts(t, d))
	}
	if path := cgroupPath(t, pidOf(t, d, p.id), "memory"); !strings.HasPrefix(path, d.CgroupParent+"/") {
		t.Errorf("cgroup is %q, not below %q", path, d.CgroupParent)
	}
	if err := removePod(d, p.id); err != nil {
		t.Fatal(err)
	}

	order(t, d, "ADD", "no-network", stubOrder{Code: 107, Msg: "out of addresses"})
	_, err := d.StartPod(t.Context(), d.PodConfig("no-network"), stubHandler)
	wantError(t, err, codes.Internal, "attach network", stubPlugin, "out of addresses")
	nothingLeft(t, d)
	calls := stubCalls(t, d, "no-network")
	if got := commandsOf(calls); got != "ADD DEL" {
		t.Errorf("the plugin was called for %q", got)
	} else if calls[0].ID != calls[1].ID || calls[0].NetNS != calls[1].NetNS {
		t.Errorf("ADD and DEL differ: %+v", calls)
	}

	_, err = d.StartPod(t.Context(), d.PodConfig("no-runtime"), brokenHandler)
	wantError(t, err, status.Code(err), "start sandbox", "/no/such/runtime") // the class is the runtime's
	nothingLeft(t, d)
}

// nothingLeft checks that no pod is there and the machine is as it was.
func nothingLeft(t *testing.T, d *daemon.Daemon) {
	t.Helper()
	list, err := d.Runtime().ListPodSandbox(t.Context(), &cri.ListPodSandboxRequest{})
	if err != nil || len(list.Items) != 0 {
		t.Errorf("pods %v, %v", list, err)
	}
	if err := d.CheckClean(); err != nil {
		t.Error(err)
	}
}

func TestRPC_03_StopPodSandbox(t *testing.T) {
	t.Parallel()
	d := shared(t)
	p := runPod(d, "stopped")
	ctr := p.run(d, daemon.ContainerConfig("main", plain(t, d)))
	pid, ip := pidOf(t, d, ctr), podStatus(t, d, p.id).Network.Ip
	netns := fmt.Sprintf("/proc/%d/ns/net", pid)
	pinned, err := os.Readlink(netns)
	if err != nil || !exists(ipamFile(d, ip)) {
		t.Fatalf("namespace %v, address %s given out: %v", err, ip, exists(ipamFile(d, ip)))
	}
	for range 2 {
		if err := stopPod(d, p.id); err != nil {
			t.Fatal(err)
		}
		if s := podStatus(t, d, p.id); s.State != cri.PodSandboxState_SANDBOX_NOTREADY {
			t.Errorf("pod is %s", s.State)
		}
		s := containerStatus(t, d, ctr)
		if s.State != cri.ContainerState_CONTAINER_EXITED || s.ExitCode != 137 || alive(pid) {
			t.Errorf("container is %s with code %d, its process lives: %v", s.State, s.ExitCode, alive(pid))
		}
		if exists(ipamFile(d, ip)) {
			t.Errorf("address %s is still given out", ip)
		}
		for _, m := range netnsMounts(t, d) {
			if strings.Contains(m, p.id) {
				t.Errorf("namespace %s (%s) is still pinned", m, pinned)
			}
		}
	}
	if err := stopPod(d, unknownID); err != nil {
		t.Errorf("unknown pod: %v", err)
	}
	wantError(t, stopPod(d, ""), codes.InvalidArgument, "pod_sandbox_id")
}

func TestRPC_04_RemovePodSandbox(t *testing.T) {
	t.Parallel()
	d := shared(t)
	p := runPod(d, "removed")
	ctr := p.run(d, daemon.ContainerConfig("main", plain(t, d)))
	never, err := p.create(d, daemon.ContainerConfig("never-started", plain(t, d)))
	if err != nil {
		t.Fatal(err)
	}
	pid := pidOf(t, d, ctr)
	group := filepath.Dir(cgroupFile(t, pid, "memory", "x"))
	if err := removePod(d, p.id); err != nil {
		t.Fatal(err)
	}
	waitGone(t, pid)
	if exists(group) {
		t.Errorf("cgroup %s is still there", group)
	}
	_, err = d.Runtime().PodSandboxStatus(t.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: p.id})
	wantError(t, err, codes.NotFound, p.id)
	collectGarbage(t, d)
	for _, id := range []string{ctr, never} {
		_, err = d.Runtime().ContainerStatus(t.Context(), &cri.ContainerStatusRequest{ContainerId: id})
		wantError(t, err, codes.NotFound, id)
		if hasSnapshot(t, d, id) {
			t.Errorf("root filesystem of %s is still there", id)
		}
	}
	if err := errors.Join(removePod(d, p.id), removePod(d, unknownID)); err != nil {
		t.Errorf("again: %v", err)
	}
	wantError(t, removePod(d, ""), codes.InvalidArgument, "pod_sandbox_id")
}

func hasSnapshot(t *testing.T, d *daemon.Daemon, key string) bool {
	t.Helper()
	found := false
	err := d.Client().SnapshotService("overlayfs").Walk(namespaced(t.Context()), func(_ context.Context, i snapshots.Info) error {
		found = found || i.Name == key
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func TestRPC_05_PodSandboxStatus(t *testing.T) {
	t.Parallel()
	d := shared(t)
	before := time.Now()
	p := runPod(d, "told", func(c *cri.PodSandboxConfig) {
		c.Annotations = map[string]string{"note": "as given"}
		c.Metadata.Attempt = 3
		c.Linux.SecurityContext.NamespaceOptions.Ipc = cri.NamespaceMode_NODE
	})
	got := podStatus(t, d, p.id)
	if at := time.Unix(0, got.CreatedAt); at.Before(before) || at.After(time.Now()) {
		t.Errorf("created at %v", at)
	}
	if !strings.HasPrefix(got.Network.GetIp(), d.Scope().Subnet.String()[:7]) {
		t.Errorf("address is %q, the subnet %s", got.Network.GetIp(), d.Scope().Subnet)
	}
	want := &cri.PodSandboxStatus{
		Id: p.id, Metadata: p.config.Metadata, State: cri.PodSandboxState_SANDBOX_READY,
		Labels: p.config.Labels, Annotations: p.config.Annotations, RuntimeHandler: defaultHandler,
		CreatedAt: got.CreatedAt, Network: got.Network,
		Linux: &cri.LinuxPodSandboxStatus{Namespaces: &cri.Namespace{Options: p.config.Linux.SecurityContext.NamespaceOptions}},
	}
	if !proto.Equal(got, want) {
		t.Errorf("got\n%v, want\n%v", got, want)
	}
	_, err := d.Runtime().PodSandboxStatus(t.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: unknownID})
	wantError(t, err, codes.NotFound, unknownID)
	_, err = d.Runtime().PodSandboxStatus(t.Context(), &cri.PodSandboxStatusRequest{})
	wantError(t, err, codes.InvalidArgument, "pod_sandbox_id")
}

func TestRPC_06_ListPodSandbox(t *testing.T) {
	t.Parallel()
	d := shared(t)
	mark := func(colour string) func(*cri.PodSandboxConfig) {
		return func(c *cri.PodSandboxConfig) { hostNetwork(c); c.Labels["rpc06"], c.Labels["colour"] = "yes", colour }
	}
	red, blue, stopped := runPod(d, "red", mark("red")), runPod(d, "blue", mark("blue")), runPod(d, "stopped", mark("red"))
	if err := stopPod(d, stopped.id); err != nil {
		t.Fatal(err)
	}
	ready := &cri.PodSandboxStateValue{State: cri.PodSandboxState_SANDBOX_READY}
	notReady := &cri.PodSandboxStateValue{State: cri.PodSandboxState_SANDBOX_NOTREADY}
	ours := func(more ...string) map[string]string {
		m := map[string]string{"rpc06": "yes"}
		for i := 0; i < len(more); i += 2 {
			m[more[i]] = more[i+1]
		}
		return m
	}
	for name, c := range map[string]struct {
		filter *cri.PodSandboxFilter
		want   []pod
	}{
		"label":                  {&cri.PodSandboxFilter{LabelSelector: ours()}, []pod{red, blue, stopped}},
		"two labels":             {&cri.PodSandboxFilter{LabelSelector: ours("colour", "red")}, []pod{red, stopped}},
		"label and ready":        {&cri.PodSandboxFilter{LabelSelector: ours("colour", "red"), State: ready}, []pod{red}},
		"label and not ready":    {&cri.PodSandboxFilter{LabelSelector: ours(), State: notReady}, []pod{stopped}},
		"ID":                     {&cri.PodSandboxFilter{Id: blue.id}, []pod{blue}},
		"prefix of an ID":        {&cri.PodSandboxFilter{Id: blue.id[:12]}, []pod{blue}},
		"ID and label, matching": {&cri.PodSandboxFilter{Id: blue.id, LabelSelector: ours("colour", "blue")}, []pod{blue}},
		"ID and label, not":      {&cri.PodSandboxFilter{Id: blue.id, LabelSelector: ours("colour", "red")}, nil},
		"ID and state, not":      {&cri.PodSandboxFilter{Id: blue.id, State: notReady}, nil},
		"value of a label":       {&cri.PodSandboxFilter{LabelSelector: ours("colour", "green")}, nil},
		"unknown ID":             {&cri.PodSandboxFilter{Id: unknownID}, nil},
	} {
		list, err := d.Runtime().ListPodSandbox(t.Context(), &cri.ListPodSandboxRequest{Filter: c.filter})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		samePods(t, name, list.Items, c.want)
	}
	all, err := d.Runtime().ListPodSandbox(t.Context(), &cri.ListPodSandboxRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []pod{red, blue, stopped} {
		i := slices.IndexFunc(all.Items, func(item *cri.PodSandbox) bool { return item.Id == p.id })
		if i < 0 || !proto.Equal(all.Items[i].Metadata, p.config.Metadata) || all.Items[i].RuntimeHandler != defaultHandler || all.Items[i].CreatedAt == 0 {
			t.Errorf("without a filter, item %d of %d for %s", i, len(all.Items), p.config.Metadata.Name)
		}
	}
}

func samePods(t *testing.T, name string, got []*cri.PodSandbox, want []pod) {
	t.Helper()
	var gotIDs, wantIDs []string
	for _, item := range got {
		gotIDs = append(gotIDs, item.Id)
	}
	for _, p := range want {
		wantIDs = append(wantIDs, p.id)
	}
	slices.Sort(gotIDs)
	slices.Sort(wantIDs)
	if !slices.Equal(gotIDs, wantIDs) {
		t.Errorf("%s: got %q, want %q", name, gotIDs, wantIDs)
	}
}

func TestRPC_07_StreamPodSandboxes(t *testing.T) {
	t.Parallel()
	d := shared(t)
	filter := &cri.PodSandboxFilter{LabelSelector: map[string]string{"rpc07": "yes"}}
	var pods []pod
	for i := range 3 {
		pods = append(pods, runPod(d, fmt.Sprint("streamed", i), hostNetwork, func(c *cri.PodSandboxConfig) { c.Labels["rpc07"] = "yes" }))
	}
	stream, err := d.Runtime().StreamPodSandboxes(t.Context(), &cri.StreamPodSandboxesRequest{Filter: filter})
	if err != nil {
		t.Fatal(err)
	}
	var got []*cri.PodSandbox
	for {
		part, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, part.PodSandboxes...)
	}
	samePods(t, "stream", got, pods)
	list, err := d.Runtime().ListPodSandbox(t.Context(), &cri.ListPodSandboxRequest{Filter: filter})
	if err != nil {
		t.Fatal(err)
	}
	for _, item := range list.Items {
		if !slices.ContainsFunc(got, func(s *cri.PodSandbox) bool { return proto.Equal(s, item) }) {
			t.Errorf("%v is not in the stream %v", item, got)
		}
	}
}

func TestRPC_27_UpdateRuntimeConfig(t *testing.T) {
	d := start(t, templated...)
	update := func(cidr string) error {
		_, err := d.Runtime().UpdateRuntimeConfig(t.Context(), &cri.UpdateRuntimeConfigRequest{
			RuntimeConfig: &cri.RuntimeConfig{NetworkConfig: &cri.NetworkConfig{PodCidr: cidr}}})
		return err
	}
	if _, err := d.Runtime().UpdateRuntimeConfig(t.Context(), &cri.UpdateRuntimeConfigRequest{}); err != nil {
		t.Errorf("nothing in it: %v", err)
	}
	if err := update(""); err != nil {
		t.Errorf("no range: %v", err)
	}
	if files, err := os.ReadDir(d.CNIDir); err != nil || len(files) != 0 {
		t.Errorf("there is %v without a range, %v", files, err)
	}
	for _, cidr := range []string{"10.88.0.0/24", "fd00:88::/64", "10.88.0.0/24,fd00:88::/64"} {
		if err := update(cidr); err != nil {
			t.Fatalf("%s: %v", cidr, err)
		}
		files, err := filepath.Glob(filepath.Join(d.CNIDir, "*"))
		if err != nil || len(files) != 1 {
			t.Fatalf("%s: files %q, %v", cidr, files, err)
		}
		var conf struct {
			Plugins []struct{ Ranges []string }
		}
		text, err := os.ReadFile(files[0])
		if err == nil {
			err = json.Unmarshal(text, &conf)
		}
		if err != nil || len(conf.Plugins) != 1 || strings.Join(conf.Plugins[0].Ranges, ",") != cidr {
			t.Errorf("%s was rendered to %s, %v", cidr, text, err)
		}
		eventually(t, soon, func() error { return networkReady(t, d) })
		if err := os.Remove(files[0]); err != nil { // else it stays as it is
			t.Fatal(err)
		}
	}
	wantError(t, update("10.88.0.0"), codes.InvalidArgument, "pod_cidr")
}

// templated are the options of a daemon without a network and with a template
// for one.
var templated = []daemon.Option{
	daemon.Conflist(""),
	daemon.Edit(func(in *daemon.Instance, c daemon.Config) {
		const ranges = `{{range $i, $r := .PodCIDRRanges}}{{if $i}}, {{end}}"{{$r}}"{{end}}`
		path := filepath.Join(in.Dir, "template")
		must(os.WriteFile(path, []byte(strings.Replace(stubConflist(in.Dir), `"control"`, `"ranges": [`+ranges+`], "control"`, 1)), 0o644))
		c.Set(path, "plugins", daemon.RuntimePlugin, "cni", "conf_template")
	}),
}

// networkReady is nil when the node's network is, else the reason.
func networkReady(t *testing.T, d *daemon.Daemon) error {
	t.Helper()
	s, err := d.Runtime().Status(t.Context(), &cri.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range s.Status.Conditions {
		if c.Type == cri.NetworkReady && !c.Status {
			return fmt.Errorf("%s: %s", c.Reason, c.Message)
		}
	}
	return nil
}

func TestRPC_28_Status(t *testing.T) {
	d := shared(t)
	s, err := d.Runtime().Status(t.Context(), &cri.StatusRequest{Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{cri.RuntimeReady, cri.NetworkReady} {
		if !slices.ContainsFunc(s.Status.Conditions, func(c *cri.RuntimeCondition) bool { return c.Type == want && c.Status }) {
			t.Errorf("%s is not true in %v", want, s.Status.Conditions)
		}
	}
	if len(s.RuntimeHandlers) < 3 || s.Features == nil || len(s.Info) == 0 {
		t.Errorf("handlers %v, features %v, info %v", s.RuntimeHandlers, s.Features, s.Info)
	}
	for k, v := range s.Info {
		// One value is text, as in containerd.
		if !json.Valid([]byte(v)) && !strings.HasSuffix(k, "LoadStatus") && k != "golang" {
			t.Errorf("info %s is not JSON: %.200s", k, v)
		}
	}
	if !strings.Contains(fmt.Sprint(s.Info), d.CNIDir) {
		t.Error("the verbose part does not tell where the network configuration is")
	}

	conf, err := os.ReadFile(d.Conflist())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(d.Conflist()); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := d.WriteConflist(string(conf)); err != nil {
			t.Fatal(err)
		}
		eventually(t, soon, func() error { return networkReady(t, d) })
	}()
	eventually(t, soon, func() error {
		reason := networkReady(t, d)
		if reason == nil {
			return errors.New("the network is ready without a configuration")
		}
		if text := reason.Error(); !strings.HasPrefix(text, "NetworkPluginNotReady: ") || len(text) < 40 {
			t.Errorf("the reason is %q", text)
		}
		return nil
	})
}

func TestRPC_36_RuntimeConfig(t *testing.T) {
	t.Parallel()
	driver := func(d *daemon.Daemon) cri.CgroupDriver {
		resp, err := d.Runtime().RuntimeConfig(t.Context(), &cri.RuntimeConfigRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return resp.GetLinux().GetCgroupDriver()
	}
	if got := driver(shared(t)); got != cri.CgroupDriver_CGROUPFS {
		t.Errorf("driver is %s", got)
	}
	d := start(t, daemon.Set(true, "plugins", daemon.RuntimePlugin, "containerd", "runtimes", ownTable(), "options", "SystemdCgroup"))
	if got := driver(d); got != cri.CgroupDriver_SYSTEMD {
		t.Errorf("with SystemdCgroup the driver is %s", got)
	}
}

// TestRPC_37_UpdatePodSandboxResources: what the kubelet says can be read back,
// also after a restart.
func TestRPC_37_UpdatePodSandboxResources(t *testing.T) {
	d := shared(t)
	p := runPod(d, "resized", hostNetwork)
	_, err := d.Runtime().UpdatePodSandboxResources(t.Context(), &cri.UpdatePodSandboxResourcesRequest{
		PodSandboxId: p.id,
		Overhead:     &cri.LinuxContainerResources{MemoryLimitInBytes: 4097 << 10},
		Resources:    &cri.LinuxContainerResources{CpuShares: 777, MemoryLimitInBytes: 123 << 20},
	})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		resp, err := d.Runtime().PodSandboxStatus(t.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: p.id, Verbose: true})
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{"777", fmt.Sprint(123 << 20), fmt.Sprint(4097 << 10)} {
			if !strings.Contains(fmt.Sprint(resp.Info), want) {
				t.Errorf("%s is not in the verbose status %.3000s", want, resp.Info)
			}
		}
		d.Restart()
	}
	_, err = d.Runtime().UpdatePodSandboxResources(t.Context(), &cri.UpdatePodSandboxResourcesRequest{PodSandboxId: unknownID})
	wantError(t, err, codes.NotFound, unknownID)
	_, err = d.Runtime().UpdatePodSandboxResources(t.Context(), &cri.UpdatePodSandboxResourcesRequest{})
	wantError(t, err, codes.InvalidArgument, "pod_sandbox_id")
}

package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
	"github.com/gantry-cri/gantry/integration/images"
)

func startContainer(d *daemon.Daemon, id string) error {
	_, err := d.Runtime().StartContainer(context.Background(), &cri.StartContainerRequest{ContainerId: id})
	return err
}

func TestRPC_08_CreateContainer(t *testing.T) {
	t.Parallel()
	d := shared(t)
	p := runPod(d, "creates")
	config := daemon.ContainerConfig("main", plain(t, d))
	id, err := p.create(d, config)
	if err != nil {
		t.Fatal(err)
	}
	if s := containerStatus(t, d, id); s.State != cri.ContainerState_CONTAINER_CREATED || s.StartedAt != 0 {
		t.Errorf("status is %v", s)
	}
	if !hasSnapshot(t, d, id) {
		t.Error("it has no root filesystem")
	}

	// What has never run is replaced: a kubelet that did not hear of it asks for
	// another, in which some mount has a new name.
	other := proto.CloneOf(config)
	other.Mounts = append(other.Mounts, &cri.Mount{ContainerPath: "/dev/termination-log", HostPath: t.TempDir()})
	replaced, err := p.create(d, other)
	if err != nil || replaced == id {
		t.Errorf("the same name and attempt, otherwise: %q, %v", replaced, err)
	}
	_, err = d.Runtime().ContainerStatus(t.Context(), &cri.ContainerStatusRequest{ContainerId: id})
	wantError(t, err, codes.NotFound, id)
	if err := startContainer(d, replaced); err != nil {
		t.Fatal(err)
	}
	_, err = p.create(d, config) // but not what runs
	wantError(t, err, codes.AlreadyExists, "main", replaced)
	again := proto.CloneOf(config)
	again.Metadata.Attempt = 1
	second, err := p.create(d, again)
	if err != nil || second == id {
		t.Errorf("another attempt: %q, %v", second, err)
	}

	_, err = pod{unknownID, p.config}.create(d, config)
	wantError(t, err, codes.NotFound, unknownID)
	if err := stopPod(d, p.id); err != nil {
		t.Fatal(err)
	}
	_, err = p.create(d, daemon.ContainerConfig("late", plain(t, d)))
	wantError(t, err, codes.FailedPrecondition, p.id, "notready")
	list, err := d.Runtime().ListContainers(t.Context(), &cri.ListContainersRequest{Filter: &cri.ContainerFilter{PodSandboxId: p.id}})
	if err != nil || len(list.Containers) != 2 {
		t.Errorf("after refusals there are %v, %v", list, err)
	}
}

func TestRPC_09_StartContainer(t *testing.T) {
	t.Parallel()
	d := shared(t)
	p := runPod(d, "starts")
	before := time.Now()
	id := p.run(d, daemon.ContainerConfig("main", plain(t, d)))
	s := containerStatus(t, d, id)
	if at := time.Unix(0, s.StartedAt); s.State != cri.ContainerState_CONTAINER_RUNNING || at.Before(before) || at.After(time.Now()) {
		t.Errorf("status is %v", s)
	}
	if !alive(pidOf(t, d, id)) {
		t.Error("it has no process")
	}

	for name, command := range map[string]string{"missing": "/no/such/program", "not-executable": "/etc/passwd"} {
		bad, err := p.create(d, daemon.ContainerConfig(name, plain(t, d), command))
		if err != nil {
			t.Fatal(err)
		}
		err = startContainer(d, bad)
		why := command
		if err != nil && strings.Contains(err.Error(), "open executable: Permission denied") {
			why = "open executable" // crun does not name it
		}
		wantError(t, err, status.Code(err), "start container", why)
		s := containerStatus(t, d, bad)
		if s.State != cri.ContainerState_CONTAINER_EXITED || s.ExitCode != 128 || s.Reason != "StartError" ||
			!strings.Contains(s.Message, why) || s.FinishedAt == 0 {
			t.Errorf("%s: status is %v", name, s)
		}
		wantError(t, startContainer(d, bad), codes.FailedPrecondition, bad)
	}
	wantError(t, startContainer(d, unknownID), codes.NotFound, unknownID)
	wantError(t, startContainer(d, ""), codes.InvalidArgument, "container_id")

	late, err := p.create(d, daemon.ContainerConfig("late", plain(t, d)))
	if err != nil {
		t.Fatal(err)
	}
	if err := stopPod(d, p.id); err != nil {
		t.Fatal(err)
	}
	wantError(t, startContainer(d, late), codes.FailedPrecondition)
}

func TestRPC_10_StopContainer(t *testing.T) {
	t.Parallel()
	d := shared(t)
	p := runPod(d, "stops")
	obeys := p.run(d, daemon.ContainerConfig("obeys", plain(t, d), "sh", "-c", "trap 'exit 7' TERM; touch /tmp/ready; while :; do sleep 0.1; done"))
	ignores := daemon.ContainerConfig("ignores", plain(t, d), "sh", "-c", "trap '' TERM; touch /tmp/ready; while :; do sleep 0.1; done")
	deaf := p.run(d, ignores)
	ignores.Metadata.Name = "killed"
	killed := p.run(d, ignores)
	for _, id := range []string{obeys, deaf, killed} {
		waitFile(t, d, id, "/tmp/ready")
	}

	for _, c := range []struct {
		id             string
		grace          int64
		code           int32
		least, longest time.Duration
	}{
		{obeys, 30, 7, 0, 10 * time.Second},
		{deaf, 1, 137, time.Second, 10 * time.Second},
		{killed, 0, 137, 0, 5 * time.Second},
	} {
		begin, pid := time.Now(), pidOf(t, d, c.id)
		if err := stopContainer(d, c.id, c.grace); err != nil {
			t.Fatal(err)
		}
		took := time.Since(begin)
		s := containerStatus(t, d, c.id)
		if s.State != cri.ContainerState_CONTAINER_EXITED || s.ExitCode != c.code || took < c.least || took > c.longest || alive(pid) {
			t.Errorf("%s after %s: %s with code %d, alive %v", s.Metadata.Name, took, s.State, s.ExitCode, alive(pid))
		}
		if err := stopContainer(d, c.id, c.grace); err != nil {
			t.Errorf("again: %v", err)
		}
	}
	if err := stopContainer(d, unknownID, 0); err != nil {
		t.Errorf("unknown container: %v", err)
	}
	wantError(t, stopContainer(d, "", 0), codes.InvalidArgument, "container_id")
}

// waitFile waits until the container has made a file, as a sign of being where
// the test wants it: with its traps set.
func waitFile(t *testing.T, d *daemon.Daemon, id, path string) {
	t.Helper()
	eventually(t, soon, func() error {
		if _, code := tryExec(t, d, id, "test", "-e", path); code != 0 {
			return fmt.Errorf("%s has no %s", id, path)
		}
		return nil
	})
}

func TestRPC_11_RemoveContainer(t *testing.T) {
	t.Parallel()
	d := shared(t)
	p := runPod(d, "removes")
	id := p.run(d, daemon.ContainerConfig("main", plain(t, d)))
	pid := pidOf(t, d, id)
	group := filepath.Dir(cgroupFile(t, pid, "memory", "x"))
	if err := removeContainer(d, id); err != nil {
		t.Fatal(err)
	}
	collectGarbage(t, d)
	if alive(pid) || exists(group) || hasSnapshot(t, d, id) {
		t.Errorf("process lives %v, cgroup there %v, root filesystem there %v", alive(pid), exists(group), hasSnapshot(t, d, id))
	}
	_, err := d.Runtime().ContainerStatus(t.Context(), &cri.ContainerStatusRequest{ContainerId: id})
	wantError(t, err, codes.NotFound, id)
	if err := errors.Join(removeContainer(d, id), removeContainer(d, unknownID)); err != nil {
		t.Errorf("again: %v", err)
	}
	wantError(t, removeContainer(d, ""), codes.InvalidArgument, "container_id")
	// Its name is free.
	p.run(d, daemon.ContainerConfig("main", plain(t, d)))
}

// listed is a set of containers in every state, in two pods.
type listed struct {
	pods                              [2]pod
	created, running, exited, another string
	label                             map[string]string
}

func makeListed(t *testing.T, d *daemon.Daemon, mark string) (l listed) {
	t.Helper()
	l.label = map[string]string{"listed": mark}
	make := func(name, image, colour string) *cri.ContainerConfig {
		c := onHost(daemon.ContainerConfig(name, image))
		c.Labels["listed"], c.Labels["colour"] = mark, colour
		return c
	}
	for i := range l.pods {
		l.pods[i] = runPod(d, fmt.Sprint(mark, i), hostNetwork)
	}
	img := plain(t, d)
	var err error
	if l.created, err = l.pods[0].create(d, make("created", img, "red")); err != nil {
		t.Fatal(err)
	}
	l.running = l.pods[0].run(d, make("running", img, "blue"))
	l.exited = l.pods[0].run(d, make("exited", img, "red"))
	if err := stopContainer(d, l.exited, 0); err != nil {
		t.Fatal(err)
	}
	l.another = l.pods[1].run(d, make("another", img, "red"))
	return l
}

func TestRPC_12_ListContainers(t *testing.T) {
	t.Parallel()
	d := shared(t)
	l := makeListed(t, d, "rpc12")
	in := func(s cri.ContainerState) *cri.ContainerStateValue { return &cri.ContainerStateValue{State: s} }
	red := map[string]string{"listed": "rpc12", "colour": "red"}
	for name, c := range map[string]struct {
		filter *cri.ContainerFilter
		want   []string
	}{
		"label":          {&cri.ContainerFilter{LabelSelector: l.label}, []string{l.created, l.running, l.exited, l.another}},
		"two labels":     {&cri.ContainerFilter{LabelSelector: red}, []string{l.created, l.exited, l.another}},
		"pod":            {&cri.ContainerFilter{PodSandboxId: l.pods[1].id}, []string{l.another}},
		"pod and labels": {&cri.ContainerFilter{PodSandboxId: l.pods[0].id, LabelSelector: red}, []string{l.created, l.exited}},
		"created":        {&cri.ContainerFilter{PodSandboxId: l.pods[0].id, State: in(cri.ContainerState_CONTAINER_CREATED)}, []string{l.created}},
		"running":        {&cri.ContainerFilter{LabelSelector: l.label, State: in(cri.ContainerState_CONTAINER_RUNNING)}, []string{l.running, l.another}},
		"exited":         {&cri.ContainerFilter{LabelSelector: l.label, State: in(cri.ContainerState_CONTAINER_EXITED)}, []string{l.exited}},
		"unknown state":  {&cri.ContainerFilter{LabelSelector: l.label, State: in(cri.ContainerState_CONTAINER_UNKNOWN)}, nil},
		"ID":             {&cri.ContainerFilter{Id: l.running}, []string{l.running}},
		"prefix":         {&cri.ContainerFilter{Id: l.running[:12]}, []string{l.running}},
		"ID and pod":     {&cri.ContainerFilter{Id: l.running, PodSandboxId: l.pods[1].id}, nil},
		"unknown ID":     {&cri.ContainerFilter{Id: unknownID}, nil},
	} {
		list, err := d.Runtime().ListContainers(t.Context(), &cri.ListContainersRequest{Filter: c.filter})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		sameContainers(t, name, list.Containers, c.want)
	}
	all, err := d.Runtime().ListContainers(t.Context(), &cri.ListContainersRequest{})
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(all.Containers, func(c *cri.Container) bool { return c.Id == l.another })
	if i < 0 {
		t.Fatalf("without a filter there is no %s", l.another)
	}
	if c := all.Containers[i]; c.PodSandboxId != l.pods[1].id || c.Metadata.Name != "another" || c.ImageRef == "" || c.ImageId == "" || c.CreatedAt == 0 {
		t.Errorf("item is %v", c)
	}
}

func sameContainers(t *testing.T, name string, got []*cri.Container, want []string) {
	t.Helper()
	var ids []string
	for _, c := range got {
		ids = append(ids, c.Id)
	}
	slices.Sort(ids)
	slices.Sort(want)
	if !slices.Equal(ids, want) {
		t.Errorf("%s: got %q, want %q", name, ids, want)
	}
}

func TestRPC_13_StreamContainers(t *testing.T) {
	t.Parallel()
	d := shared(t)
	l := makeListed(t, d, "rpc13")
	stream, err := d.Runtime().StreamContainers(t.Context(), &cri.StreamContainersRequest{Filter: &cri.ContainerFilter{LabelSelector: l.label}})
	if err != nil {
		t.Fatal(err)
	}
	var got []*cri.Container
	for {
		part, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, part.Containers...)
	}
	sameContainers(t, "stream", got, []string{l.created, l.running, l.exited, l.another})
}

func TestRPC_14_ContainerStatus(t *testing.T) {
	t.Parallel()
	d := shared(t)
	img := image(t, d, images.Spec{StopSignal: "SIGUSR1"})
	p := runPod(d, "told-of")
	source := t.TempDir()
	config := daemon.ContainerConfig("main", img, "sh", "-c", "trap 'exit 9' USR1; touch /tmp/ready; while :; do sleep 0.1; done")
	config.Metadata.Attempt = 2
	config.Annotations = map[string]string{"note": "as given"}
	config.Mounts = []*cri.Mount{{ContainerPath: "/data", HostPath: source, Readonly: true}}
	config.Linux.Resources = &cri.LinuxContainerResources{CpuShares: 200, CpuPeriod: 100000, CpuQuota: 50000, MemoryLimitInBytes: 64 << 20, OomScoreAdj: 900}
	config.Linux.SecurityContext.RunAsUser = &cri.Int64Value{Value: images.AliceUID}
	config.Linux.SecurityContext.RunAsGroup = &cri.Int64Value{Value: images.GroupGID}
	id := p.run(d, config)
	got := containerStatus(t, d, id)
	want := &cri.ContainerStatus{
		Id: id, Metadata: config.Metadata, State: cri.ContainerState_CONTAINER_RUNNING,
		CreatedAt: got.CreatedAt, StartedAt: got.StartedAt,
		Image: config.Image, ImageRef: got.ImageRef, ImageId: got.ImageId,
		Labels: config.Labels, Annotations: config.Annotations, Mounts: config.Mounts,
		LogPath:    filepath.Join(p.config.LogDirectory, config.LogPath),
		Resources:  &cri.ContainerResources{Linux: config.Linux.Resources},
		User:       &cri.ContainerUser{Linux: &cri.LinuxContainerUser{Uid: images.AliceUID, Gid: images.GroupGID, SupplementalGroups: got.User.GetLinux().GetSupplementalGroups()}},
		StopSignal: got.StopSignal,
	}
	if !proto.Equal(got, want) {
		t.Errorf("got\n%v, want\n%v", got, want)
	}
	if !slices.Contains(got.User.GetLinux().GetSupplementalGroups(), int64(images.GroupGID)) {
		t.Errorf("groups are %v", got.User)
	}
	imageStatus, err := d.Images().ImageStatus(t.Context(), &cri.ImageStatusRequest{Image: config.Image})
	if err != nil || got.ImageId != imageStatus.Image.Id || !slices.Contains(imageStatus.Image.RepoDigests, got.ImageRef) {
		t.Errorf("image ID %q and reference %q of %v, %v", got.ImageId, got.ImageRef, imageStatus, err)
	}
	if got.CreatedAt == 0 || got.StartedAt < got.CreatedAt || got.FinishedAt != 0 {
		t.Errorf("created %d, started %d, finished %d", got.CreatedAt, got.StartedAt, got.FinishedAt)
	}

	waitFile(t, d, id, "/tmp/ready")
	if err := stopContainer(d, id, 30); err != nil {
		t.Fatal(err)
	}
	end := containerStatus(t, d, id)
	if end.State != cri.ContainerState_CONTAINER_EXITED || end.ExitCode != 9 || end.Reason != "Error" || end.FinishedAt < end.StartedAt {
		t.Errorf("at the end %v", end)
	}
	_, err = d.Runtime().ContainerStatus(t.Context(), &cri.ContainerStatusRequest{ContainerId: unknownID})
	wantError(t, err, codes.NotFound, unknownID)
	_, err = d.Runtime().ContainerStatus(t.Context(), &cri.ContainerStatusRequest{})
	wantError(t, err, codes.InvalidArgument, "container_id")
}

func TestRPC_14_StopSignal(t *testing.T) {
	t.Parallel()
	d := shared(t)
	p := runPod(d, "signalled", hostNetwork)
	for image, want := range map[string]cri.Signal{
		image(t, d, images.Spec{StopSignal: "SIGUSR1"}):    cri.Signal_SIGNAL_SIGUSR1,
		image(t, d, images.Spec{StopSignal: "SIGRTMIN+3"}): cri.Signal_SIGNAL_SIGRTMINPLUS3,
		plain(t, d): cri.Signal_SIGNAL_SIGTERM,
	} {
		config := onHost(daemon.ContainerConfig(fmt.Sprint("signal", int(want)), image))
		id, err := p.create(d, config)
		if err != nil {
			t.Fatal(err)
		}
		if got := containerStatus(t, d, id).StopSignal; got != want {
			t.Errorf("stop signal is %s, want %s", got, want)
		}
	}
}

func update(d *daemon.Daemon, id string, r *cri.LinuxContainerResources) error {
	_, err := d.Runtime().UpdateContainerResources(context.Background(), &cri.UpdateContainerResourcesRequest{ContainerId: id, Linux: r})
	return err
}

// limits are what the kernel holds for a process.
func limits(t *testing.T, pid int) map[string]int64 {
	t.Helper()
	v1 := exists("/sys/fs/cgroup/memory")
	if !v1 {
		return map[string]int64{"memory": readInt(t, cgroupFile(t, pid, "memory", "memory.max"))}
	}
	return map[string]int64{
		"memory": readInt(t, cgroupFile(t, pid, "memory", "memory.limit_in_bytes")),
		"shares": readInt(t, cgroupFile(t, pid, "cpu", "cpu.shares")),
		"quota":  readInt(t, cgroupFile(t, pid, "cpu", "cpu.cfs_quota_us")),
	}
}

func TestRPC_15_UpdateContainerResources(t *testing.T) {
	t.Parallel()
	d := shared(t)
	p := runPod(d, "updates", hostNetwork)
	config := onHost(daemon.ContainerConfig("main", plain(t, d)))
	config.Linux.Resources = &cri.LinuxContainerResources{CpuShares: 100, CpuPeriod: 100000, CpuQuota: 20000, MemoryLimitInBytes: 64 << 20, OomScoreAdj: 900}
	id := p.run(d, config)
	pid := pidOf(t, d, id)
	check := func(when string, want map[string]int64) {
		t.Helper()
		got := limits(t, pid)
		for k, v := range got {
			if v != want[k] {
				t.Errorf("%s: the kernel has %s %d, want %d", when, k, v, want[k])
			}
		}
		r := containerStatus(t, d, id).Resources.GetLinux()
		if r.GetCpuShares() != want["shares"] || r.GetCpuQuota() != want["quota"] || r.GetMemoryLimitInBytes() != want["memory"] {
			t.Errorf("%s: the status has %v, want %v", when, r, want)
		}
	}
	check("before", map[string]int64{"shares": 100, "quota": 20000, "memory": 64 << 20})
	if err := update(d, id, &cri.LinuxContainerResources{CpuShares: 300, CpuPeriod: 100000, CpuQuota: 40000, MemoryLimitInBytes: 128 << 20}); err != nil {
		t.Fatal(err)
	}
	check("updated", map[string]int64{"shares": 300, "quota": 40000, "memory": 128 << 20})
	if err := update(d, id, &cri.LinuxContainerResources{CpuShares: 400}); err != nil {
		t.Fatal(err)
	}
	check("updated in part", map[string]int64{"shares": 400, "quota": 40000, "memory": 128 << 20})
	// No machine has this CPU, so nothing of it holds.
	if err := update(d, id, &cri.LinuxContainerResources{CpuShares: 500, MemoryLimitInBytes: 32 << 20, CpusetCpus: "4095"}); err == nil {
		t.Error("an impossible set of CPUs was accepted")
	} else if !strings.Contains(err.Error(), "update container resources") {
		t.Errorf("error is %v", err)
	}
	check("refused", map[string]int64{"shares": 400, "quota": 40000, "memory": 128 << 20})

	wantError(t, update(d, unknownID, &cri.LinuxContainerResources{CpuShares: 2}), codes.NotFound, unknownID)
	wantError(t, update(d, id, nil), codes.InvalidArgument, "linux")
	wantError(t, update(d, "", &cri.LinuxContainerResources{}), codes.InvalidArgument, "container_id")
}

func TestRPC_21_ContainerStats(t *testing.T) {
	t.Parallel()
	d := shared(t)
	p := runPod(d, "measured")
	id := p.run(d, daemon.ContainerConfig("main", plain(t, d)))
	read := func(id string) *cri.ContainerStats {
		t.Helper()
		resp, err := d.Runtime().ContainerStats(t.Context(), &cri.ContainerStatsRequest{ContainerId: id})
		if err != nil {
			t.Fatal(err)
		}
		return resp.Stats
	}
	before := read(id)
	if before.Attributes.GetId() != id || before.Attributes.GetMetadata().GetName() != "main" || before.Attributes.Labels["io.kubernetes.container.name"] != "main" {
		t.Errorf("attributes are %v", before.Attributes)
	}
	const written = 8 << 20
	full := p.run(d, daemon.ContainerConfig("full", plain(t, d)))
	sh(d, full, fmt.Sprintf("dd if=/dev/zero of=/big bs=1M count=%d 2>/dev/null", written>>20))
	eventually(t, soon, func() error { // a reading may be from before, where another test lists all
		if grown := read(full).WritableLayer.GetUsedBytes().GetValue() - before.WritableLayer.GetUsedBytes().GetValue(); grown < written {
			return fmt.Errorf("after %d bytes were written the writable layer is %d bytes larger than another", written, grown)
		}
		return nil
	})
	sh(d, id, "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done")
	var after *cri.ContainerStats
	eventually(t, soon, func() error { // readings may be shared for a moment
		if after = read(id); after.Cpu.Timestamp <= before.Cpu.Timestamp {
			return fmt.Errorf("sampled at %d, then at %d", before.Cpu.Timestamp, after.Cpu.Timestamp)
		}
		return nil
	})
	if used := after.Cpu.GetUsageCoreNanoSeconds().GetValue() - before.Cpu.GetUsageCoreNanoSeconds().GetValue(); used < 20e6 || used > 60e9 {
		t.Errorf("a busy loop took %d ns of CPU", used)
	}
	if m := after.Memory; m.GetWorkingSetBytes().GetValue() == 0 || m.GetUsageBytes().GetValue() < m.GetWorkingSetBytes().GetValue() {
		t.Errorf("memory is %v", m)
	}
	if l := after.WritableLayer; l.GetFsId().GetMountpoint() == "" || l.GetInodesUsed().GetValue() == 0 || l.Timestamp == 0 {
		t.Errorf("writable layer is %v", l)
	}
	_, err := d.Runtime().ContainerStats(t.Context(), &cri.ContainerStatsRequest{ContainerId: unknownID})
	wantError(t, err, codes.NotFound, unknownID)
	_, err = d.Runtime().ContainerStats(t.Context(), &cri.ContainerStatsRequest{})
	wantError(t, err, codes.InvalidArgument, "container_id")
}

func TestRPC_22_ListContainerStats(t *testing.T) {
	t.Parallel()
	d := shared(t)
	l := makeListed(t, d, "rpc22")
	for name, c := range map[string]struct {
		filter *cri.ContainerStatsFilter
		want   []string
	}{
		"label":          {&cri.ContainerStatsFilter{LabelSelector: l.label}, []string{l.running, l.another}},
		"pod":            {&cri.ContainerStatsFilter{PodSandboxId: l.pods[0].id}, []string{l.running}},
		"ID":             {&cri.ContainerStatsFilter{Id: l.another}, []string{l.another}},
		"pod and label":  {&cri.ContainerStatsFilter{PodSandboxId: l.pods[0].id, LabelSelector: map[string]string{"colour": "green"}}, nil},
		"ID, not in pod": {&cri.ContainerStatsFilter{Id: l.another, PodSandboxId: l.pods[0].id}, nil},
	} {
		resp, err := d.Runtime().ListContainerStats(t.Context(), &cri.ListContainerStatsRequest{Filter: c.filter})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		sameStats(t, name, resp.Stats, l, c.want)
	}
	resp, err := d.Runtime().ListContainerStats(t.Context(), &cri.ListContainerStatsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{l.running, l.another} {
		if !slices.ContainsFunc(resp.Stats, func(s *cri.ContainerStats) bool { return s.Attributes.Id == id }) {
			t.Errorf("without a filter there is no %s", id)
		}
	}
}

// sameStats checks that the running containers of want are there with a
// reading, and no other running one is.
func sameStats(t *testing.T, name string, got []*cri.ContainerStats, l listed, want []string) {
	t.Helper()
	var ids []string
	for _, s := range got {
		id := s.Attributes.GetId()
		if id == l.created || id == l.exited {
			continue // whether one that does not run is listed is nobody's rule
		}
		ids = append(ids, id)
		if s.Memory.GetUsageBytes().GetValue() == 0 || s.Cpu.GetUsageCoreNanoSeconds().GetValue() == 0 {
			t.Errorf("%s: %s has no reading: %v", name, id, s)
		}
	}
	slices.Sort(ids)
	slices.Sort(want)
	if !slices.Equal(ids, want) {
		t.Errorf("%s: got %q, want %q", name, ids, want)
	}
}

func TestRPC_23_StreamContainerStats(t *testing.T) {
	t.Parallel()
	d := shared(t)
	l := makeListed(t, d, "rpc23")
	stream, err := d.Runtime().StreamContainerStats(t.Context(), &cri.StreamContainerStatsRequest{Filter: &cri.ContainerStatsFilter{LabelSelector: l.label}})
	if err != nil {
		t.Fatal(err)
	}
	var got []*cri.ContainerStats
	for {
		part, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, part.ContainerStats...)
	}
	sameStats(t, "stream", got, l, []string{l.running, l.another})
}

// TestBadInput: a request that cannot mean anything is refused with the name of
// the field, and makes nothing.
func TestBadInput(t *testing.T) {
	d := shared(t)
	long := strings.Repeat("x", 5000)
	runCases := map[string]struct {
		edit func(*cri.PodSandboxConfig)
		word string
	}{
		"no metadata":          {func(c *cri.PodSandboxConfig) { c.Metadata = nil }, "config.metadata"},
		"no name":              {func(c *cri.PodSandboxConfig) { c.Metadata.Name = "" }, "config.metadata.name"},
		"a path as name":       {func(c *cri.PodSandboxConfig) { c.Metadata.Name = "../../etc" }, "config.metadata.name"},
		"a long name":          {func(c *cri.PodSandboxConfig) { c.Metadata.Name = long }, "config.metadata.name"},
		"a path as namespace":  {func(c *cri.PodSandboxConfig) { c.Metadata.Namespace = "a/b" }, "config.metadata.namespace"},
		"a line as uid":        {func(c *cri.PodSandboxConfig) { c.Metadata.Uid = "a\nb" }, "config.metadata.uid"},
		"a CNI argument":       {func(c *cri.PodSandboxConfig) { c.Metadata.Name = "a;K8S_POD_NAME=b" }, "metadata"},
		"a long hostname":      {func(c *cri.PodSandboxConfig) { c.Hostname = strings.Repeat("h", 65) }, "config.hostname"},
		"a strange hostname":   {func(c *cri.PodSandboxConfig) { c.Hostname = "a b" }, "config.hostname"},
		"relative logs":        {func(c *cri.PodSandboxConfig) { c.LogDirectory = "logs" }, "config.log_directory"},
		"logs above":           {func(c *cri.PodSandboxConfig) { c.LogDirectory = "/var/log/../../etc" }, "config.log_directory"},
		"a line as DNS server": {func(c *cri.PodSandboxConfig) { c.DnsConfig = &cri.DNSConfig{Servers: []string{"1.1.1.1\nx"}} }, "dns_config.servers"},
		"a large port": {func(c *cri.PodSandboxConfig) {
			c.PortMappings = []*cri.PortMapping{{HostPort: 65536, ContainerPort: 1}}
		}, "port_mappings[0].host_port"},
		"a negative port": {func(c *cri.PodSandboxConfig) { c.PortMappings = []*cri.PortMapping{{HostPort: 80, ContainerPort: -1}} }, "port_mappings[0].container_port"},
		"no address as host IP": {func(c *cri.PodSandboxConfig) {
			c.PortMappings = []*cri.PortMapping{{HostPort: 80, ContainerPort: 80, HostIp: "here"}}
		}, "port_mappings[0].host_ip"},
		"an unknown protocol": {func(c *cri.PodSandboxConfig) {
			c.PortMappings = []*cri.PortMapping{{HostPort: 80, ContainerPort: 80, Protocol: 9}}
		}, "port_mappings[0].protocol"},
		"a cgroup above":     {func(c *cri.PodSandboxConfig) { c.Linux.CgroupParent = "/a/../../b" }, "cgroup_parent"},
		"target without pod": {func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.NamespaceOptions.Pid = cri.NamespaceMode_TARGET }, "namespace_options.pid"},
		"network of a target": {func(c *cri.PodSandboxConfig) {
			c.Linux.SecurityContext.NamespaceOptions.Network = cri.NamespaceMode_CONTAINER
		}, "namespace_options.network"},
		"group without user": {func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.RunAsGroup = &cri.Int64Value{Value: 1} }, "run_as_group"},
		"negative user":      {func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.RunAsUser = &cri.Int64Value{Value: -1} }, "run_as_user"},
	}
	for name, c := range runCases {
		config := d.PodConfig("bad")
		c.edit(config)
		_, err := d.Runtime().RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: config})
		t.Run("pod with "+name, func(t *testing.T) { wantError(t, err, codes.InvalidArgument, c.word) })
	}
	_, err := d.Runtime().RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{})
	wantError(t, err, codes.InvalidArgument, "config")
	nothingLeft(t, d)
}

// TestBadContainerInput is TestBadInput for containers.
func TestBadContainerInput(t *testing.T) {
	t.Parallel()
	d := shared(t)
	p := runPod(d, "strict", hostNetwork)
	cases := map[string]struct {
		edit func(*cri.ContainerConfig)
		word string
	}{
		"no metadata":         {func(c *cri.ContainerConfig) { c.Metadata = nil }, "config.metadata"},
		"no name":             {func(c *cri.ContainerConfig) { c.Metadata.Name = "" }, "config.metadata.name"},
		"a path as name":      {func(c *cri.ContainerConfig) { c.Metadata.Name = "../x" }, "config.metadata.name"},
		"a long name":         {func(c *cri.ContainerConfig) { c.Metadata.Name = strings.Repeat("x", 5000) }, "config.metadata.name"},
		"no image":            {func(c *cri.ContainerConfig) { c.Image = nil }, "config.image"},
		"a log above":         {func(c *cri.ContainerConfig) { c.LogPath = "../../x.log" }, "log_path"},
		"an absolute log":     {func(c *cri.ContainerConfig) { c.LogPath = "/x.log" }, "log_path"},
		"a nil mount":         {func(c *cri.ContainerConfig) { c.Mounts = []*cri.Mount{nil} }, "mounts[0]"},
		"a mount nowhere":     {func(c *cri.ContainerConfig) { c.Mounts = []*cri.Mount{{HostPath: "/tmp"}} }, "mounts[0].container_path"},
		"a mount on the root": {func(c *cri.ContainerConfig) { c.Mounts = []*cri.Mount{{HostPath: "/tmp", ContainerPath: "/x/.."}} }, "mounts[0].container_path"},
		"a relative source":   {func(c *cri.ContainerConfig) { c.Mounts = []*cri.Mount{{HostPath: "tmp", ContainerPath: "/x"}} }, "mounts[0].host_path"},
		"a nil device":        {func(c *cri.ContainerConfig) { c.Devices = []*cri.Device{nil} }, "devices[0]"},
		"a target missing":    {func(c *cri.ContainerConfig) { c.Linux.SecurityContext.NamespaceOptions.Pid = cri.NamespaceMode_TARGET }, "target_id"},
		"another network": {func(c *cri.ContainerConfig) {
			c.Linux.SecurityContext.NamespaceOptions.Network = cri.NamespaceMode_CONTAINER
		}, "namespace_options.network"},
		"two users": {func(c *cri.ContainerConfig) {
			c.Linux.SecurityContext.RunAsUser, c.Linux.SecurityContext.RunAsUsername = &cri.Int64Value{}, "x"
		}, "run_as_user"},
		"group without user": {func(c *cri.ContainerConfig) { c.Linux.SecurityContext.RunAsGroup = &cri.Int64Value{Value: 1} }, "run_as_group"},
	}
	for name, c := range cases {
		config := onHost(daemon.ContainerConfig("bad", plain(t, d)))
		c.edit(config)
		_, err := p.create(d, config)
		t.Run("container with "+name, func(t *testing.T) { wantError(t, err, codes.InvalidArgument, c.word) })
	}
	_, err := p.create(d, nil)
	wantError(t, err, codes.InvalidArgument, "config")
	config := onHost(daemon.ContainerConfig("bad", "localhost:1/no/such:image"))
	_, err = p.create(d, config)
	wantError(t, err, codes.NotFound, "localhost:1/no/such:image")
	target := onHost(daemon.ContainerConfig("bad", plain(t, d)))
	target.Linux.SecurityContext.NamespaceOptions.Pid = cri.NamespaceMode_TARGET
	target.Linux.SecurityContext.NamespaceOptions.TargetId = unknownID
	_, err = p.create(d, target)
	wantError(t, err, codes.NotFound, "target_id")
	list, err := d.Runtime().ListContainers(t.Context(), &cri.ListContainersRequest{Filter: &cri.ContainerFilter{PodSandboxId: p.id}})
	if err != nil || len(list.Containers) != 0 {
		t.Errorf("refused containers are listed: %v, %v", list, err)
	}
	if left, err := os.ReadDir(p.config.LogDirectory); err != nil || len(left) != 0 {
		t.Errorf("refused containers left logs %v, %v", left, err)
	}
}

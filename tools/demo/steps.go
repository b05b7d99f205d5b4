package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
	"github.com/gantry-cri/gantry/integration/images"
)

// demo is what one step leaves for the next.
type demo struct {
	handler  string
	stock    bool
	bins     []string
	registry *images.Registry
	node     *daemon.Instance

	image     string
	config    *cri.PodSandboxConfig
	pod       string
	address   string
	container string
}

type step struct {
	title string
	do    func() (string, error)
}

const greeting = "hello from a gantry pod"

// steps is the demo, in order.
func (d *demo) steps(ctx context.Context) []step {
	with := func(f func(context.Context) (string, error)) func() (string, error) {
		return func() (string, error) { return f(ctx) }
	}
	list := []step{
		{"look for room on the machine", func() (string, error) { return room(d.node.Scope()) }},
		{"ask for its version", with(d.version)},
		{"push an image to the registry", with(d.push)},
		{"pull it", with(d.pull)},
		{"run a pod", with(d.runPod)},
		{"start a container in it", with(d.start)},
		{"read its web page", with(d.readPage)},
		{"read its log", with(d.readLog)},
		{"run a command in it", with(d.execSync)},
		{"run one with a stream each way", with(d.exec)},
		{"forward a port to it", with(d.forward)},
		{"read its statistics", with(d.stats)},
		{checkTitle, with(d.check)},
		{"restart the daemon under it", with(d.restart)},
		{"stop and remove the pod", with(d.remove)},
		{"stop the daemon, look for leftovers", func() (string, error) { return "none", d.node.Close() }},
	}
	if d.stock {
		list = slices.DeleteFunc(list, func(s step) bool { return s.title == checkTitle })
	}
	return list
}

func (d *demo) version(ctx context.Context) (string, error) {
	v, err := d.node.Runtime().Version(ctx, &cri.VersionRequest{})
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%s %s, CRI %s", v.RuntimeName, v.RuntimeVersion, v.RuntimeApiVersion), nil
}

func (d *demo) push(ctx context.Context) (string, error) {
	img, err := images.Build(images.Spec{
		// PID 1 must want to stop to do so.
		Cmd:    []string{"sh", "-c", "trap 'exit 0' TERM; echo serving on port 80; httpd -f -v -p 80 -h /www & wait"},
		Ports:  []string{"80/tcp"},
		Layers: [][]images.File{{images.Text("www/index.html", greeting+"\n")}},
	})
	if err != nil {
		return "", err
	}
	d.image, err = d.registry.Put(ctx, "demo/web:v1", img)
	return d.image, err
}

func (d *demo) pull(ctx context.Context) (string, error) {
	resp, err := d.node.Images().PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: d.image}})
	if err != nil {
		return "", err
	}
	return resp.ImageRef, nil
}

func (d *demo) runPod(ctx context.Context) (string, error) {
	d.config = d.node.PodConfig("web")
	var err error
	if d.pod, err = d.node.StartPod(ctx, d.config, d.handler); err != nil {
		return "", err
	}
	status, err := d.node.Runtime().PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: d.pod})
	if err != nil {
		return "", err
	}
	d.address = status.GetStatus().GetNetwork().GetIp()
	if d.address == "" {
		return "", errors.New("the pod has no address")
	}
	return fmt.Sprintf("%.12s at %s", d.pod, d.address), nil
}

func (d *demo) start(ctx context.Context) (string, error) {
	var err error
	d.container, err = d.node.StartContainer(ctx, d.pod, d.config, daemon.ContainerConfig("web", d.image))
	return fmt.Sprintf("%.12s", d.container), err
}

// poll repeats until it works: a server needs a moment to listen.
func poll(ctx context.Context, try func() (string, error)) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		got, err := try()
		if err == nil {
			return got, nil
		}
		select {
		case <-ctx.Done():
			return "", err
		case <-tick.C:
		}
	}
}

func (d *demo) readPage(ctx context.Context) (string, error) {
	return poll(ctx, func() (string, error) { return get(ctx, "http://"+d.address+"/") })
}

func get(ctx context.Context, address string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return "", err
	}
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{Proxy: nil, DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return "", err
	}
	return expect(string(body), greeting)
}

func expect(got, want string) (string, error) {
	if !strings.Contains(got, want) {
		return "", fmt.Errorf("got %q, want %q in it", got, want)
	}
	return got, nil
}

func (d *demo) readLog(ctx context.Context) (string, error) {
	return poll(ctx, func() (string, error) {
		text, err := os.ReadFile(filepath.Join(d.config.LogDirectory, "web.log"))
		if err != nil {
			return "", err
		}
		return expect(string(text), "serving on port 80")
	})
}

func (d *demo) execSync(ctx context.Context) (string, error) {
	resp, err := d.node.Runtime().ExecSync(ctx, &cri.ExecSyncRequest{
		ContainerId: d.container, Cmd: []string{"sh", "-c", "hostname; id; ps"}, Timeout: 10,
	})
	if err != nil {
		return "", err
	}
	if resp.ExitCode != 0 {
		return "", fmt.Errorf("exit code %d: %s", resp.ExitCode, resp.Stderr)
	}
	return expect(string(resp.Stdout), "httpd")
}

func (d *demo) exec(ctx context.Context) (string, error) {
	resp, err := d.node.Runtime().Exec(ctx, &cri.ExecRequest{
		ContainerId: d.container, Cmd: []string{"tr", "a-z", "A-Z"}, Stdin: true, Stdout: true, Stderr: true,
	})
	if err != nil {
		return "", err
	}
	at, err := url.Parse(resp.Url)
	if err != nil {
		return "", err
	}
	session, err := remotecommand.NewSPDYExecutor(&rest.Config{}, http.MethodPost, at)
	if err != nil {
		return "", err
	}
	var out, errs bytes.Buffer
	err = session.StreamWithContext(ctx, remotecommand.StreamOptions{
		Stdin: strings.NewReader("shout this\n"), Stdout: &out, Stderr: &errs,
	})
	if err != nil {
		return "", fmt.Errorf("%w (%s)", err, errs.String())
	}
	return expect(out.String(), "SHOUT THIS")
}

func (d *demo) forward(ctx context.Context) (string, error) {
	resp, err := d.node.Runtime().PortForward(ctx, &cri.PortForwardRequest{PodSandboxId: d.pod, Port: []int32{80}})
	if err != nil {
		return "", err
	}
	at, err := url.Parse(resp.Url)
	if err != nil {
		return "", err
	}
	transport, upgrader, err := spdy.RoundTripperFor(&rest.Config{})
	if err != nil {
		return "", err
	}
	stop, ready := make(chan struct{}), make(chan struct{})
	dialer := spdy.NewDialer(upgrader, &http.Client{Transport: transport}, http.MethodPost, at)
	forwarder, err := portforward.NewOnAddresses(dialer, []string{"127.0.0.1"}, []string{"0:80"}, stop, ready, io.Discard, io.Discard)
	if err != nil {
		return "", err
	}
	ended := make(chan error, 1)
	go func() { ended <- forwarder.ForwardPorts() }()
	defer func() {
		close(stop)
		<-ended
	}()
	select {
	case <-ready:
	case err := <-ended:
		ended <- err
		return "", fmt.Errorf("forwarding ended: %w", err)
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
	ports, err := forwarder.GetPorts()
	if err != nil {
		return "", err
	}
	return get(ctx, fmt.Sprintf("http://127.0.0.1:%d/", ports[0].Local))
}

// stats asks until the counters are there: some runtimes collect now and then.
func (d *demo) stats(ctx context.Context) (string, error) {
	return poll(ctx, func() (string, error) {
		resp, err := d.node.Runtime().ContainerStats(ctx, &cri.ContainerStatsRequest{ContainerId: d.container})
		if err != nil {
			return "", err
		}
		cpu := resp.GetStats().GetCpu().GetUsageCoreNanoSeconds().GetValue()
		memory := resp.GetStats().GetMemory().GetWorkingSetBytes().GetValue()
		if cpu == 0 || memory == 0 {
			return "", fmt.Errorf("no counters yet: %v", resp.GetStats())
		}
		return fmt.Sprintf("CPU %.1f ms, memory %d KiB", float64(cpu)/1e6, memory/1024), nil
	})
}

const checkTitle = "let gantry check the node"

// check has the operator's command look at the node while the pod runs: it must
// find no fault with the daemon, and nothing without an owner.
func (d *demo) check(ctx context.Context) (string, error) {
	program, err := find("gantry", d.bins)
	if err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, program, "check", "--config", filepath.Join(d.node.Dir, "config.toml"), "--output", "json")
	cmd.Env = append(os.Environ(), "PATH="+strings.Join(append(d.bins, os.Getenv("PATH")), ":"))
	out, err := cmd.Output()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return "", err
	}
	return verdict(out)
}

// verdict reads what gantry check found. What it says about the machine and the
// configuration is for the reader; the daemon must have no fault, and nothing
// may be without an owner.
func verdict(out []byte) (string, error) {
	var report struct {
		Findings []struct{ Area, Name, Status, Text string }
	}
	if err := json.Unmarshal(out, &report); err != nil {
		return "", fmt.Errorf("read what gantry found: %w", err)
	}
	var ok, left int
	var notes []string
	for _, f := range report.Findings {
		line := fmt.Sprintf("%s %s: %s", f.Status, f.Name, f.Text)
		switch {
		case f.Status == "ok":
			ok++
		case f.Area == "leftovers", f.Area == "daemon" && f.Status == "failure":
			return "", errors.New(line)
		default:
			notes = append(notes, line)
		}
		if f.Area == "leftovers" {
			left++
		}
	}
	if left == 0 {
		return "", fmt.Errorf("gantry did not look for leftovers: %s", out)
	}
	return strings.Join(append([]string{fmt.Sprintf("%d findings are good, nothing is without an owner", ok)}, notes...), "\n"), nil
}

func (d *demo) restart(ctx context.Context) (string, error) {
	if err := errors.Join(d.node.Kill(ctx), d.node.Start(ctx)); err != nil {
		return "", err
	}
	if _, err := d.readPage(ctx); err != nil {
		return "", err
	}
	out, err := d.execSync(ctx)
	if err != nil {
		return "", err
	}
	host, _, _ := strings.Cut(out, "\n")
	return "killed and started; " + host + " runs on", nil
}

func (d *demo) remove(ctx context.Context) (string, error) {
	stop := &cri.StopContainerRequest{ContainerId: d.container, Timeout: 5}
	if _, err := d.node.Runtime().StopContainer(ctx, stop); err != nil {
		return "", err
	}
	return "done", d.node.RemovePod(ctx, d.pod)
}

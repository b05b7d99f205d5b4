package lifecycle

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"google.golang.org/grpc/codes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
	utilexec "k8s.io/client-go/util/exec"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/integration/daemon"
)

// both is a command that uses all streams and exits with 7.
var both = []string{"sh", "-c", "read a; echo out:$a; echo err:$a >&2; exit 7"}

func TestSTR_01_SPDY(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	c := b.script("app", "while read l; do echo said $l; done")
	c.Stdin = true
	id := b.run(c)
	for _, p := range []string{protocolV1, protocolV2, protocolV3, protocolV4} {
		s, err := b.exec(dial{protocols: []string{p}}, id, strings.NewReader("x\n"), both...)
		if s.stdout != "out:x\n" || s.stderr != "err:x\n" {
			t.Errorf("%s: %+v, %v", p, s, err)
		}
		// Before version 4 an exit code is but a text, which clients of the
		// first version do not wait for.
		switch {
		case p == protocolV4 && (s.code != 7 || err != nil),
			(p == protocolV2 || p == protocolV3) && (err == nil || !strings.Contains(err.Error(), "7")):
			t.Errorf("%s: exit code %d, %v", p, s.code, err)
		}
		a := b.attach(dial{protocols: []string{p}}, &cri.AttachRequest{ContainerId: id, Stdin: true, Stdout: true, Stderr: true}, nil)
		a.write("hello " + p + "\n")
		a.says("said hello " + p + "\n")
		a.stdin.Close()
		a.cancel()
	}
	b.serve(id, 8000, "read l; echo port 8000")
	if got, err := talk(b.forward(8000)[0], "x\n"); got != "port 8000\n" || err != nil {
		t.Errorf("port-forward: %q, %v", got, err)
	}
}

// serve runs a script for every connection to a port, in a container.
func (b *box) serve(id string, port int, script string) {
	b.t.Helper()
	b.daemonize(id, port, fmt.Sprintf("nc -ll -p %d -e sh -c '%s'", port, script))
}

// daemonize runs a command in the background of a container and waits until it
// listens on the port.
func (b *box) daemonize(id string, port int, command string) {
	b.t.Helper()
	b.Exec(id, "sh", "-c", command+" >/dev/null 2>&1 </dev/null &")
	eventually(b.t, ample, func() error {
		if out, code := tryExec(b.t, b.Daemon, id, "sh", "-c", fmt.Sprintf("netstat -ltn | grep ':%d '", port)); code != 0 {
			return fmt.Errorf("nothing listens on %d yet: %s", port, out)
		}
		return nil
	})
}

func TestSTR_02_WebSocket(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	c := b.script("app", "while read l; do echo said $l; done")
	c.Stdin = true
	id := b.run(c)
	for _, p := range []string{protocolV1, protocolV4} {
		s, err := b.exec(dial{websocket: true, protocols: []string{p}}, id, strings.NewReader("x\n"), both...)
		if s.stdout != "out:x\n" || s.stderr != "err:x\n" {
			t.Errorf("%s: %+v, %v", p, s, err)
		}
		if p == protocolV4 && (s.code != 7 || err != nil) {
			t.Errorf("%s: exit code %d, %v", p, s.code, err)
		}
		a := b.attach(dial{websocket: true, protocols: []string{p}}, &cri.AttachRequest{ContainerId: id, Stdin: true, Stdout: true, Stderr: true}, nil)
		a.write("hello " + p + "\n")
		a.says("said hello " + p + "\n")
		a.cancel()
	}
	for _, p := range []string{"base64.channel.k8s.io", "v4.base64.channel.k8s.io"} {
		address := b.execURL(&cri.ExecRequest{ContainerId: id, Cmd: both, Stdin: true, Stdout: true, Stderr: true})
		got := b.channels(address, p, []byte("x\n"))
		if got[1] != "out:x\n" || got[2] != "err:x\n" || !strings.Contains(got[3], "7") {
			t.Errorf("%s: channels brought %q", p, got)
		}
	}
	b.serve(id, 8000, "read l; echo port 8000")
	for _, p := range []string{"v4.channel.k8s.io", "v4.base64.channel.k8s.io"} {
		resp, err := b.Runtime().PortForward(t.Context(), &cri.PortForwardRequest{PodSandboxId: b.pod, Port: []int32{8000}})
		if err != nil {
			t.Fatal(err)
		}
		got := b.channels(resp.Url, p, []byte("x\n"))
		port := string(binary.LittleEndian.AppendUint16(nil, 8000))
		if got[0] != port+"port 8000\n" || got[1] != port {
			t.Errorf("%s: port-forward brought %q", p, got)
		}
	}
}

// channels opens a WebSocket, sends input on channel 0 and collects what every
// channel brings.
func (b *box) channels(address, protocol string, stdin []byte) map[byte]string {
	b.t.Helper()
	d := websocket.Dialer{Subprotocols: []string{protocol}, HandshakeTimeout: ample}
	conn, _, err := d.Dial(strings.Replace(address, "http", "ws", 1), nil)
	if err != nil {
		b.t.Fatalf("open WebSocket: %v", err)
	}
	defer conn.Close()
	if got := conn.Subprotocol(); got != protocol {
		b.t.Errorf("asked for protocol %s, got %s", protocol, got)
	}
	coded := strings.Contains(protocol, "base64")
	if stdin != nil {
		kind, message := websocket.BinaryMessage, append([]byte{0}, stdin...)
		if coded {
			kind, message = websocket.TextMessage, []byte("0"+base64.StdEncoding.EncodeToString(stdin))
		}
		if err := conn.WriteMessage(kind, message); err != nil {
			b.t.Fatal(err)
		}
	}
	if err := conn.SetReadDeadline(time.Now().Add(ample)); err != nil {
		b.t.Fatal(err)
	}
	got := map[byte]string{}
	for {
		_, message, err := conn.ReadMessage()
		if err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				b.t.Fatalf("the session does not end; it brought %q", got)
			}
			return got
		}
		if len(message) == 0 {
			continue
		}
		channel, text := message[0], message[1:]
		if coded {
			channel -= '0'
			if text, err = base64.StdEncoding.DecodeString(string(text)); err != nil {
				b.t.Fatal(err)
			}
		}
		got[channel] += string(text)
	}
}

func TestSTR_03_ExitCode(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	id := b.run(b.sleeper("app"))
	for _, d := range []dial{spdyDial, websocketDial} {
		for _, code := range []int{0, 1, 42, 255} {
			if s, err := b.exec(d, id, nil, "sh", "-c", fmt.Sprintf("exit %d", code)); s.code != code || err != nil {
				t.Errorf("exit %d arrives as %d, %v", code, s.code, err)
			}
		}
		if s, err := b.exec(d, id, nil, "sh", "-c", "kill -9 $$"); s.code != 137 || err != nil {
			t.Errorf("a killed command has exit code %d, %v", s.code, err)
		}
		s, err := b.exec(d, id, nil, "/no/such/program")
		if err == nil && s.code == 0 {
			t.Error("a missing program ran")
		}
	}
}

// TestSTR_04_StdinHalfClose: a command that reads to the end of its input still
// gives all of its output.
func TestSTR_04_StdinHalfClose(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	id := b.run(b.sleeper("app"))
	data := make([]byte, 5<<20)
	r := rand.NewChaCha8([32]byte{4})
	_, _ = r.Read(data)
	s, err := b.exec(spdyDial, id, strings.NewReader(string(data)), "sh", "-c", "cat >/tmp/f; sha256sum </tmp/f; cat /tmp/f >&2")
	if want := fmt.Sprintf("%x  -\n", sha256.Sum256(data)); s.stdout != want || err != nil {
		t.Errorf("the sum inside is %q, want %q; %v", s.stdout, want, err)
	}
	if sha256.Sum256([]byte(s.stderr)) != sha256.Sum256(data) {
		t.Errorf("%d bytes came back of %d", len(s.stderr), len(data))
	}
}

func TestSTR_05_Resize(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	id := b.run(b.sleeper("app"))
	for _, d := range []dial{spdyDial, websocketDial} {
		address := b.execURL(&cri.ExecRequest{ContainerId: id, Tty: true, Stdin: true, Stdout: true,
			Cmd: []string{"sh", "-c", "trap 'stty size' WINCH; stty size; echo ready; while ! [ -e /tmp/done ]; do sleep 0.1; done; rm /tmp/done; exit 3"}})
		sizes, out, done := make(sizeQueue, 4), &lockedBuffer{}, make(chan error, 1)
		r, w := io.Pipe()
		go func() {
			done <- d.streamTo(t.Context(), address, remotecommand.StreamOptions{Stdin: r, Stdout: out, Tty: true, TerminalSizeQueue: sizes})
		}()
		a := &attached{t: t, out: out, done: done}
		a.says("ready")
		sizes <- remotecommand.TerminalSize{Width: 101, Height: 33}
		a.says("33 101\r\n")
		sizes <- remotecommand.TerminalSize{Width: 77, Height: 22}
		a.says("22 77\r\n")
		close(sizes)
		b.Exec(id, "touch", "/tmp/done")
		exit, ok := errors.AsType[utilexec.CodeExitError](a.ends())
		if !ok || exit.Code != 3 {
			t.Errorf("the session ends with %v", exit)
		}
		w.Close()
	}
}

func TestSTR_06_Validation(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	id := b.run(b.sleeper("app"))
	ctx := t.Context()
	cmd := []string{"true"}
	for name, req := range map[string]*cri.ExecRequest{
		"no stream":      {ContainerId: id, Cmd: cmd},
		"tty and stderr": {ContainerId: id, Cmd: cmd, Tty: true, Stdout: true, Stderr: true},
	} {
		_, err := b.Runtime().Exec(ctx, req)
		wantError(t, err, codes.InvalidArgument)
		a := &cri.AttachRequest{ContainerId: id, Tty: req.Tty, Stdout: req.Stdout, Stderr: req.Stderr}
		if _, err = b.Runtime().Attach(ctx, a); err == nil {
			t.Errorf("attach with %s has no error", name)
		}
	}
	_, err := b.Runtime().Exec(ctx, &cri.ExecRequest{ContainerId: id, Stdout: true})
	if err == nil {
		t.Error("exec without a command has no error")
	}
	_, err = b.Runtime().Exec(ctx, &cri.ExecRequest{ContainerId: "absent", Cmd: cmd, Stdout: true})
	wantError(t, err, codes.NotFound, "absent")
	_, err = b.Runtime().Attach(ctx, &cri.AttachRequest{ContainerId: "absent", Stdout: true})
	wantError(t, err, codes.NotFound, "absent")
	_, err = b.Runtime().PortForward(ctx, &cri.PortForwardRequest{PodSandboxId: "absent"})
	wantError(t, err, codes.NotFound, "absent")
	b.stop(id, 10)
	if _, err = b.Runtime().Exec(ctx, &cri.ExecRequest{ContainerId: id, Cmd: cmd, Stdout: true}); err == nil {
		t.Error("exec in a stopped container has no error")
	}
}

func TestSTR_07_OneTimeURL(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	id := b.run(b.sleeper("app"))
	address := b.execURL(&cri.ExecRequest{ContainerId: id, Cmd: []string{"sh", "-c", "echo x >>/tmp/runs"}, Stdout: true})
	for i := range 3 {
		err := spdyDial.streamTo(t.Context(), address, remotecommand.StreamOptions{Stdout: io.Discard})
		if (err == nil) != (i == 0) {
			t.Errorf("use %d of the URL: %v", i+1, err)
		}
	}
	if got := sh(b.Daemon, id, "cat /tmp/runs"); got != "x" {
		t.Errorf("the command ran as often as %q says", got)
	}
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	if again := b.execURL(&cri.ExecRequest{ContainerId: id, Cmd: []string{"true"}, Stdout: true}); again == address {
		t.Error("two requests have one URL")
	}
	for _, p := range []string{u.Path, filepath.Dir(u.Path) + "/guessed", "/", "/exec/", "/attach/x"} {
		resp, err := http.Get((&url.URL{Scheme: u.Scheme, Host: u.Host, Path: p}).String())
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusNotFound {
			t.Errorf("GET %s: %s", p, resp.Status)
		}
	}
}

// TestSTR_08_ListenerAndTimeouts: the address is the configured one, and a
// client that does nothing is dropped.
func TestSTR_08_ListenerAndTimeouts(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(l.Addr().String())
	l.Close()
	b := newBoxOn(t, start(t,
		daemon.Set("127.0.0.1", "plugins", daemon.CRIPlugin, "stream_server_address"),
		daemon.Set(port, "plugins", daemon.CRIPlugin, "stream_server_port"),
		daemon.Set("2s", "plugins", daemon.CRIPlugin, "stream_idle_timeout")))
	c := b.script("app", "sleep 1000")
	c.Stdin = true
	id := b.run(c)
	req := &cri.AttachRequest{ContainerId: id, Stdin: true, Stdout: true}
	if got := b.attachURL(req); !strings.HasPrefix(got, "http://127.0.0.1:"+port+"/") {
		t.Errorf("the URL is %s, want port %s", got, port)
	}
	begin := time.Now()
	a := b.attach(websocketDial, req, nil)
	_ = a.ends()
	if idle := time.Since(begin); idle < 2*time.Second {
		t.Errorf("an idle client was dropped after %v", idle)
	}
	if s := b.status(id); s.State != cri.ContainerState_CONTAINER_RUNNING {
		t.Errorf("the container is %s", s.State)
	}
}

func TestSTR_09_TLS(t *testing.T) {
	t.Parallel()
	t.Run("self-signed", func(t *testing.T) {
		b := newBoxOn(t, start(t, daemon.Set(true, "plugins", daemon.CRIPlugin, "enable_tls_streaming")))
		b.tlsExec(rest.TLSClientConfig{Insecure: true})
	})
	t.Run("key-pair", func(t *testing.T) {
		cert, key, ca := keyPair(t)
		b := newBoxOn(t, start(t,
			daemon.Set(true, "plugins", daemon.CRIPlugin, "enable_tls_streaming"),
			daemon.Set("127.0.0.1", "plugins", daemon.CRIPlugin, "stream_server_address"),
			daemon.Set(cert, "plugins", daemon.CRIPlugin, "x509_key_pair_streaming", "tls_cert_file"),
			daemon.Set(key, "plugins", daemon.CRIPlugin, "x509_key_pair_streaming", "tls_key_file")))
		b.tlsExec(rest.TLSClientConfig{CAData: ca})
		id := b.run(b.sleeper("other"))
		address := b.execURL(&cri.ExecRequest{ContainerId: id, Cmd: []string{"true"}, Stdout: true})
		if err := spdyDial.streamTo(t.Context(), address, remotecommand.StreamOptions{Stdout: io.Discard}); err == nil {
			t.Error("a client that does not know the authority was content")
		}
	})
}

// withTLS serves streams over TLS with a key pair in files.
func withTLS(cert, key string, more ...daemon.Option) []daemon.Option {
	return append(more,
		daemon.Set(true, "plugins", daemon.CRIPlugin, "enable_tls_streaming"),
		daemon.Set("127.0.0.1", "plugins", daemon.CRIPlugin, "stream_server_address"),
		daemon.Set(cert, "plugins", daemon.CRIPlugin, "x509_key_pair_streaming", "tls_cert_file"),
		daemon.Set(key, "plugins", daemon.CRIPlugin, "x509_key_pair_streaming", "tls_key_file"))
}

// identified is a client that knows the server's authority and has a key pair.
func identified(ca []byte, cert, key string) rest.TLSClientConfig {
	return rest.TLSClientConfig{CAData: ca, CertFile: cert, KeyFile: key}
}

// TestSTR_10_TLSPolicy: only clients with a certificate of the right authority,
// and with a version and a suite that are allowed, get through.
func TestSTR_10_TLSPolicy(t *testing.T) {
	t.Parallel()
	cert, key, ca := keyPair(t)
	host := func(b *box) string {
		u, err := url.Parse(b.execURL(&cri.ExecRequest{ContainerId: b.run(b.sleeper("any")), Cmd: []string{"true"}, Stdout: true}))
		if err != nil {
			t.Fatal(err)
		}
		return u.Host
	}
	speak := func(address string, c *tls.Config) (tls.ConnectionState, error) {
		c.InsecureSkipVerify = true
		conn, err := tls.Dial("tcp", address, c)
		if err != nil {
			return tls.ConnectionState{}, err
		}
		return conn.ConnectionState(), conn.Close()
	}
	t.Run("clients", func(t *testing.T) {
		mine, mineKey, _ := keyPair(t)
		other, otherKey, _ := keyPair(t)
		b := newBoxOn(t, start(t, withTLS(cert, key, daemon.Set(mine, "plugins", daemon.CRIPlugin, "stream_tls_client_ca"))...))
		b.tlsExec(identified(ca, mine, mineKey))
		b.tlsRefused(rest.TLSClientConfig{CAData: ca})
		b.tlsRefused(identified(ca, other, otherKey))
	})
	t.Run("suites", func(t *testing.T) {
		const allowed, not = tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256
		b := newBoxOn(t, start(t, withTLS(cert, key, daemon.Set([]string{tls.CipherSuiteName(allowed)}, "plugins", daemon.CRIPlugin, "stream_tls_cipher_suites"))...))
		b.tlsExec(rest.TLSClientConfig{CAData: ca})
		address := host(b)
		if s, err := speak(address, &tls.Config{MaxVersion: tls.VersionTLS12, CipherSuites: []uint16{not, allowed}}); err != nil || s.CipherSuite != allowed {
			t.Errorf("suite %s, %v", tls.CipherSuiteName(s.CipherSuite), err)
		}
		if s, err := speak(address, &tls.Config{MaxVersion: tls.VersionTLS12, CipherSuites: []uint16{not}}); err == nil {
			t.Errorf("suite %s was accepted", tls.CipherSuiteName(s.CipherSuite))
		}
	})
	t.Run("version", func(t *testing.T) {
		b := newBoxOn(t, start(t, withTLS(cert, key, daemon.Set("1.3", "plugins", daemon.CRIPlugin, "stream_tls_min_version"))...))
		b.tlsExec(rest.TLSClientConfig{CAData: ca})
		address := host(b)
		if s, err := speak(address, &tls.Config{MaxVersion: tls.VersionTLS12}); err == nil {
			t.Errorf("version %s was accepted", tls.VersionName(s.Version))
		}
		if s, err := speak(address, &tls.Config{}); err != nil || s.Version != tls.VersionTLS13 {
			t.Errorf("version %s, %v", tls.VersionName(s.Version), err)
		}
	})
}

// TestSTR_11_TLSReload: key pair and authority of clients are exchanged while the
// daemon runs. New connections go by the new ones, and a session goes on.
func TestSTR_11_TLSReload(t *testing.T) {
	t.Parallel()
	cert, key, ca := keyPair(t)
	client, clientKey, _ := keyPair(t)
	authority := filepath.Join(t.TempDir(), "ca.pem")
	replace(t, client, authority)
	b := newBoxOn(t, start(t, withTLS(cert, key, daemon.Set(authority, "plugins", daemon.CRIPlugin, "stream_tls_client_ca"))...))
	pid := b.PID()
	b.tlsExec(identified(ca, client, clientKey))

	id := b.run(b.sleeper("open"))
	in, typed := io.Pipe()
	defer typed.Close()
	open := make(chan string, 1)
	d := spdyDial
	d.rest.TLSClientConfig = identified(ca, client, clientKey)
	go func() {
		s, err := b.exec(d, id, in, "sh", "-c", "touch /tmp/open; cat")
		open <- fmt.Sprint(s.stdout, err)
	}()
	eventually(t, ample, func() error {
		_, err := os.Stat(fmt.Sprintf("/proc/%d/root/tmp/open", b.pid(id)))
		return err
	})

	newCert, newKey, newCA := keyPair(t)
	newClient, newClientKey, _ := keyPair(t)
	replace(t, newCert, cert)
	replace(t, newKey, key)
	replace(t, newClient, authority)
	b.tlsExec(identified(newCA, newClient, newClientKey))
	b.tlsRefused(identified(newCA, client, clientKey))
	b.tlsRefused(identified(ca, newClient, newClientKey))

	fmt.Fprintln(typed, "still here")
	typed.Close()
	if got, want := <-open, fmt.Sprint("still here\n", nil); got != want {
		t.Errorf("the open session says %q, want %q", got, want)
	}
	if b.PID() != pid {
		t.Error("the daemon was started anew")
	}
}

// replace puts a copy of a file in the place of another, as tools that rotate
// certificates do.
func replace(t *testing.T, from, to string) {
	t.Helper()
	text, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to+".new", text, 0o600)
	}
	if err == nil {
		err = os.Rename(to+".new", to)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// tlsRefused wants that a client gets nowhere.
func (b *box) tlsRefused(c rest.TLSClientConfig) {
	b.t.Helper()
	id := b.run(b.sleeper(fmt.Sprint("tls-", marks.Add(1))))
	for _, d := range []dial{spdyDial, websocketDial} {
		d.rest.TLSClientConfig = c
		address := b.execURL(&cri.ExecRequest{ContainerId: id, Cmd: []string{"touch", "/tmp/run"}, Stdout: true})
		if err := d.streamTo(b.t.Context(), address, remotecommand.StreamOptions{Stdout: io.Discard}); err == nil {
			b.t.Error("a client that is not to be trusted got through")
		}
	}
	if _, err := os.Stat(fmt.Sprintf("/proc/%d/root/tmp/run", b.pid(id))); err == nil {
		b.t.Error("the command of a client that is not to be trusted was run")
	}
}

// tlsExec wants a command to work over TLS with both transports.
func (b *box) tlsExec(c rest.TLSClientConfig) {
	b.t.Helper()
	id := b.run(b.sleeper(fmt.Sprint("tls-", marks.Add(1))))
	for _, d := range []dial{spdyDial, websocketDial} {
		d.rest.TLSClientConfig = c
		if got := b.execURL(&cri.ExecRequest{ContainerId: id, Cmd: []string{"true"}, Stdout: true}); !strings.HasPrefix(got, "https://") {
			b.t.Errorf("the URL is %s", got)
		}
		if s, err := b.exec(d, id, nil, "echo", "over tls"); s.stdout != "over tls\n" || err != nil {
			b.t.Errorf("exec: %+v, %v", s, err)
		}
	}
}

// TestSTR_12_PortForward: to servers on either family's loopback only, several
// at a time.
func TestSTR_12_PortForward(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	id := b.run(b.sleeper("app"))
	b.daemonize(id, 8001, "httpd -f -p 127.0.0.1:8001 -h /www")
	b.daemonize(id, 8002, "httpd -f -p [::1]:8002 -h /www")
	b.serve(id, 8003, "cat; echo port 8003")
	ports := b.forward(8001, 8002, 8003, 8004)
	for i, want := range []string{"hello from the pod\n", "hello from the pod\n", "port 8003\n"} {
		for range 3 {
			if got, err := talk(ports[i], "GET / HTTP/1.0\r\n\r\n"); !strings.HasSuffix(got, want) || err != nil {
				t.Errorf("got %q, %v, want %q", got, err, want)
			}
		}
	}
	if got, err := talk(ports[3], "x\n"); got != "" {
		t.Errorf("a port without a server answers %q, %v", got, err)
	}
}

// TestSTR_13_PortForwardDrain: a server that reads to the end of the request
// before it answers gives its whole answer, and so do several at once.
func TestSTR_13_PortForwardDrain(t *testing.T) {
	b := newBox(t)
	id := b.run(b.sleeper("app"))
	const size = 3 << 20
	b.serve(id, 8000, fmt.Sprintf("wc -c; head -c %d /dev/zero", size))
	b.Exec(id, "sh", "-c", fmt.Sprintf("head -c %d /dev/zero >/www/big", size))
	b.daemonize(id, 8001, "httpd -f -p 8001 -h /www")
	ports := b.forward(8000, 8001)
	fds := openFiles(t, b.PID())
	for i := range 10 {
		request := strings.Repeat("r", 100000*i+1)
		got, err := talk(ports[0], request)
		count, body, _ := strings.Cut(got, "\n")
		if err != nil || strings.TrimSpace(count) != fmt.Sprint(len(request)) || len(body) != size {
			t.Errorf("transfer %d: the server read %q of %d bytes and %d came of %d: %v", i, count, len(request), len(body), size, err)
		}
	}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			got, err := talk(ports[1], "GET /big HTTP/1.0\r\n\r\n")
			if _, body, _ := strings.Cut(got, "\r\n\r\n"); err != nil || len(body) != size {
				t.Errorf("parallel transfer %d: %d bytes came of %d: %v", i, len(body), size, err)
			}
		})
	}
	wg.Wait()
	eventually(t, ample, func() error {
		if now := openFiles(t, b.PID()); now > fds+2 {
			return fmt.Errorf("the daemon has %d files open, before %d", now, fds)
		}
		return nil
	})
}

// openFiles is how many descriptors a process has.
func openFiles(t *testing.T, pid int) int {
	t.Helper()
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// TestSTR_14_ExecDuringStop: commands run while a container winds down, and end
// with it.
func TestSTR_14_ExecDuringStop(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	id := b.run(b.script("app", "trap 'echo stopping' TERM; echo ready; while :; do sleep 0.1; done"))
	b.logged(id, "ready")
	const grace = 10 // seconds, in which two commands begin
	stopped := make(chan error, 1)
	begin := time.Now()
	go func() { stopped <- stopContainer(b.Daemon, id, grace) }()
	b.logged(id, "stopping")
	if got := sh(b.Daemon, id, "echo still here"); got != "still here" {
		t.Errorf("exec in the grace period: %q", got)
	}
	s, err := b.exec(spdyDial, id, nil, "sh", "-c", "echo streamed; sleep 1000")
	if s.stdout != "streamed\n" || s.code == 0 && err == nil {
		t.Errorf("a command that outlives the grace period: %+v, %v", s, err)
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	if took := time.Since(begin); took < grace*time.Second {
		t.Errorf("the grace period was over after %v", took)
	}
	if s := b.exited(id); s.ExitCode != 137 {
		t.Errorf("exit code %d", s.ExitCode)
	}
}

// TestSTR_15_AttachFanOut: several clients see the same, a late one from then
// on, and one that reads nothing holds nobody up.
func TestSTR_15_AttachFanOut(t *testing.T) {
	oursAlone(t, "backlog for a slow client")
	t.Parallel()
	b := newBox(t)
	c := b.script("app", "while read l; do [ $l = flood ] && head -c 40000000 /dev/zero | tr '\\0' x; echo said $l; done")
	c.Stdin = true
	id := b.run(c)
	req := &cri.AttachRequest{ContainerId: id, Stdin: true, Stdout: true, Stderr: true}
	first, second := b.attach(spdyDial, req, nil), b.attach(websocketDial, req, nil)
	first.write("one\n")
	first.says("said one\n")
	second.write("two\n")
	for _, a := range []*attached{first, second} {
		a.says("said two\n")
	}
	late := b.attach(spdyDial, req, nil)
	late.write("three\n")
	for _, a := range []*attached{first, second, late} {
		a.says("said three\n")
	}
	if got := late.out.String(); strings.Contains(got, "said two") {
		t.Errorf("the late client got %q", got)
	}
	stalled := b.stalledAttach(id)
	defer stalled.Close()
	input := b.attach(spdyDial, &cri.AttachRequest{ContainerId: id, Stdin: true}, nil)
	input.write("flood\n")
	b.logged(id, "said flood")
	input.write("four\n")
	b.logged(id, "said four")
	// Once it has taken nothing for long, its session ends. More output is when
	// that is noticed.
	eventually(t, 3*ample, func() error {
		input.write("again\n")
		clients := 0
		for _, o := range operations(t, b.Daemon) {
			if o.Name == "attach session" && o.ID == id {
				clients++
			}
		}
		if clients != 4 {
			return fmt.Errorf("there are %d attached clients", clients)
		}
		return nil
	})
}

// TestSTR_15_SlowClient: a client that reads late gets all that its backlog has
// room for; one that is slower than the container stays connected, misses what
// found no room and is told so in the end; the log has everything all the time.
func TestSTR_15_SlowClient(t *testing.T) {
	oursAlone(t, "backlog for a slow client")
	t.Parallel()
	b := newBox(t)
	const some, much = 8_000_000, 40_000_000
	c := b.script("app", fmt.Sprintf("while read l && [ $l != go ]; do echo $l; done; "+
		"head -c %d /dev/zero | tr '\\0' x; echo; echo said some; read l; head -c %d /dev/zero | tr '\\0' y; echo; echo said much; read l; echo bye", some, much))
	c.Stdin = true
	id := b.run(c)
	slow := &slowWriter{}
	slow.hold(nil)
	address := b.attachURL(&cri.AttachRequest{ContainerId: id, Stdout: true})
	done := make(chan error, 1)
	go func() {
		done <- spdyDial.streamTo(context.Background(), address, remotecommand.StreamOptions{Stdout: slow})
	}()
	fast := b.attach(spdyDial, &cri.AttachRequest{ContainerId: id, Stdin: true, Stdout: true}, nil)
	eventually(t, ample, func() error { // it is not attached at once
		fast.write("there\n")
		if slow.n.Load() == 0 {
			return errors.New("the slow client hears nothing")
		}
		return nil
	})
	fast.write("so\n")
	eventually(t, ample, func() error {
		if end := slow.end.Load(); !strings.HasSuffix(*end, "so\n") {
			return fmt.Errorf("the slow client heard %q last", *end)
		}
		return nil
	})
	slow.hold(func(time.Time) bool { return true })
	before := slow.n.Load()
	fast.write("go\n")
	b.logged(id, "said some")
	fast.says("said some")
	slow.hold(nil)
	for n, all := before, before+int64(some+len("\nsaid some\n")); n < all; n = slow.n.Load() {
		eventually(t, ample, func() error { // on a busy machine all of it may take longer
			if slow.n.Load() == n {
				return fmt.Errorf("the late client has %d bytes of %d and gets no more", n, all)
			}
			return nil
		})
	}
	// From now on it stays behind by more than is kept for it and what is on the
	// way, without ever standing still.
	log := b.status(id).LogPath
	slow.hold(func(begin time.Time) bool {
		info, err := os.Stat(log)
		return err == nil && info.Size()-slow.n.Load() < 30<<20 && time.Since(begin) < 100*time.Millisecond
	})
	fast.write("go\n")
	b.logged(id, "said much")
	slow.hold(nil)
	select {
	case err := <-done:
		t.Fatalf("the slow client was sent away: %v", err)
	default:
	}
	fast.write("go\n")
	if s := b.exited(id); s.ExitCode != 0 {
		t.Errorf("exit code %d", s.ExitCode)
	}
	select {
	case err := <-done:
		if err == nil || !strings.Contains(err.Error(), "left out") {
			t.Errorf("the slow client got %d bytes of %d and hears %v", slow.n.Load(), some+much, err)
		}
	case <-time.After(ample):
		t.Fatal("the session of the slow client does not end")
	}
	if text := logText(t, b.status(id).LogPath, "stdout"); strings.Count(text, "y") < much || !strings.HasSuffix(text, "bye\n") {
		t.Errorf("the log has %d bytes", len(text))
	}
}

// slowWriter takes its time for every write: as long as what it was told to be
// held by says so of a write that began then.
type slowWriter struct {
	n     atomic.Int64
	end   atomic.Pointer[string] // of what it took last
	holds atomic.Pointer[func(begin time.Time) bool]
}

func (w *slowWriter) hold(f func(begin time.Time) bool) {
	if f == nil {
		f = func(time.Time) bool { return false }
	}
	w.holds.Store(&f)
}

// Write implements io.Writer.
func (w *slowWriter) Write(p []byte) (int, error) {
	for begin := time.Now(); (*w.holds.Load())(begin); time.Sleep(time.Millisecond) {
	}
	end := string(p[max(0, len(p)-16):])
	w.end.Store(&end)
	w.n.Add(int64(len(p)))
	return len(p), nil
}

// stalledAttach is a client that never reads what the container says.
func (b *box) stalledAttach(id string) net.Conn {
	b.t.Helper()
	var raw net.Conn
	d := websocket.Dialer{Subprotocols: []string{protocolV4}, NetDialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := (&net.Dialer{}).DialContext(ctx, network, addr)
		if err == nil {
			err = conn.(*net.TCPConn).SetReadBuffer(4096)
			raw = conn
		}
		return conn, err
	}}
	address := b.attachURL(&cri.AttachRequest{ContainerId: id, Stdout: true})
	if _, _, err := d.Dial(strings.Replace(address, "http", "ws", 1), nil); err != nil {
		b.t.Fatal(err)
	}
	return raw
}

// keyPair makes a certificate for 127.0.0.1 and returns its files and itself.
func keyPair(t *testing.T) (cert, key string, ca []byte) {
	t.Helper()
	pair := selfSigned(t)
	cert, key = pemFiles(t, pair)
	ca, err := os.ReadFile(cert)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key, ca
}

// pemFiles writes a certificate and its key.
func pemFiles(t *testing.T, pair tls.Certificate) (cert, key string) {
	t.Helper()
	dir := t.TempDir()
	cert, key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	der, err := x509.MarshalPKCS8PrivateKey(pair.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(
		os.WriteFile(cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: pair.Certificate[0]}), 0o644),
		os.WriteFile(key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600)); err != nil {
		t.Fatal(err)
	}
	return cert, key
}

// selfSigned is a certificate of 127.0.0.1 that vouches for itself.
func selfSigned(t *testing.T) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(crand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

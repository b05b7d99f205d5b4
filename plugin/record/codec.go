package record

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Version is the version of the encoding. A record of a later version is
// refused; one of an earlier version is read for as long as pods of that
// release can be running.
const Version = 1

// maxEncoded bounds what is read back, in bytes. A gRPC request is at most
// 16 MiB, and a record holds one request and one specification made of it.
const maxEncoded = 64 << 20

// The CRI messages are kept in protobuf encoding, which loses no field that a
// newer kubelet set, inside JSON, which a person can read.
type wireSandbox struct {
	Version   int
	ID        string
	Config    []byte
	Handler   Handler
	Phase     Phase
	CreatedAt time.Time
	Network   Network
	Instance  Instance
	Reason    string `json:",omitempty"`
	Resources []byte `json:",omitempty"`
	Overhead  []byte `json:",omitempty"`
	Labels    Labels `json:",omitzero"`
}

type wireContainer struct {
	Version    int
	ID         string
	SandboxID  string
	Config     []byte
	Handler    Handler
	Image      Image
	Phase      ContainerPhase
	CreatedAt  time.Time
	StartedAt  time.Time
	FinishedAt time.Time
	Pid        uint32   `json:",omitempty"`
	ExitCode   int32    `json:",omitempty"`
	Reason     string   `json:",omitempty"`
	Message    string   `json:",omitempty"`
	LogPath    string   `json:",omitempty"`
	StopSignal string   `json:",omitempty"`
	Rescored   bool     `json:",omitempty"`
	Denied     []string `json:",omitempty"`
	Condemned  bool     `json:",omitempty"`
	Resources  []byte   `json:",omitempty"`
	User       []byte   `json:",omitempty"`
	Mounts     [][]byte `json:",omitempty"`
}

// Marshal encodes s. The specification of its instance is left out: it is kept
// beside the record, where containerd's own tools look for it.
func (s Sandbox) Marshal() ([]byte, error) {
	w := wireSandbox{
		Version: Version, ID: s.ID, Handler: s.Handler, Phase: s.Phase, CreatedAt: s.CreatedAt,
		Network: s.Network, Instance: s.Instance, Reason: s.Reason, Labels: s.Labels,
	}
	w.Instance.Spec = nil
	e := encoder{}
	w.Config = e.message(s.Config)
	w.Resources = e.message(s.Resources)
	w.Overhead = e.message(s.Overhead)
	return e.json(w)
}

// UnmarshalSandbox decodes what Marshal wrote. Bytes that are not a record, or
// a record without the parts that every record has, are InvalidArgument.
func UnmarshalSandbox(b []byte) (Sandbox, error) {
	var w wireSandbox
	if err := decodeJSON(b, &w); err != nil {
		return Sandbox{}, fmt.Errorf("decode sandbox record: %w", err)
	}
	s := Sandbox{
		ID: w.ID, Handler: w.Handler, Phase: w.Phase, CreatedAt: w.CreatedAt,
		Network: w.Network, Instance: w.Instance, Reason: w.Reason, Labels: w.Labels,
	}
	d := decoder{}
	s.Config = decodeMessage[cri.PodSandboxConfig](&d, "Config", w.Config, true)
	s.Resources = decodeMessage[cri.LinuxContainerResources](&d, "Resources", w.Resources, false)
	s.Overhead = decodeMessage[cri.LinuxContainerResources](&d, "Overhead", w.Overhead, false)
	_, known := sandboxMoves[w.Phase]
	if err := d.check(w.Version, w.ID, string(w.Phase), known); err != nil {
		return Sandbox{}, fmt.Errorf("decode sandbox record: %w", err)
	}
	return s, nil
}

// Marshal encodes c. Its specification is left out: it is kept beside the
// record, where containerd's own tools look for it.
func (c Container) Marshal() ([]byte, error) {
	w := wireContainer{
		Version: Version, ID: c.ID, SandboxID: c.SandboxID, Handler: c.Handler, Image: c.Image,
		Phase: c.Phase, CreatedAt: c.CreatedAt, StartedAt: c.StartedAt, FinishedAt: c.FinishedAt,
		Pid: c.Pid, ExitCode: c.ExitCode, Reason: c.Reason, Message: c.Message,
		LogPath: c.LogPath, StopSignal: c.StopSignal, Rescored: c.Rescored,
		Denied: c.Denied, Condemned: c.Condemned,
	}
	e := encoder{}
	w.Config = e.message(c.Config)
	w.Resources = e.message(c.Resources)
	w.User = e.message(c.User)
	for _, m := range c.Mounts {
		w.Mounts = append(w.Mounts, e.message(m))
	}
	return e.json(w)
}

// UnmarshalContainer decodes what Marshal wrote, as UnmarshalSandbox does.
func UnmarshalContainer(b []byte) (Container, error) {
	var w wireContainer
	if err := decodeJSON(b, &w); err != nil {
		return Container{}, fmt.Errorf("decode container record: %w", err)
	}
	c := Container{
		ID: w.ID, SandboxID: w.SandboxID, Handler: w.Handler, Image: w.Image,
		Phase: w.Phase, CreatedAt: w.CreatedAt, StartedAt: w.StartedAt, FinishedAt: w.FinishedAt,
		Pid: w.Pid, ExitCode: w.ExitCode, Reason: w.Reason, Message: w.Message,
		LogPath: w.LogPath, StopSignal: w.StopSignal, Rescored: w.Rescored,
		Denied: w.Denied, Condemned: w.Condemned,
	}
	d := decoder{}
	c.Config = decodeMessage[cri.ContainerConfig](&d, "Config", w.Config, true)
	c.Resources = decodeMessage[cri.LinuxContainerResources](&d, "Resources", w.Resources, false)
	c.User = decodeMessage[cri.ContainerUser](&d, "User", w.User, false)
	for _, m := range w.Mounts {
		c.Mounts = append(c.Mounts, decodeMessage[cri.Mount](&d, "Mounts", m, true))
	}
	_, known := containerMoves[w.Phase]
	if err := d.check(w.Version, w.ID, string(w.Phase), known); err != nil {
		return Container{}, fmt.Errorf("decode container record: %w", err)
	}
	if c.SandboxID == "" {
		return Container{}, fmt.Errorf("decode container record: SandboxID is empty: %w", errdefs.ErrInvalidArgument)
	}
	return c, nil
}

type encoder struct{ err error }

// message encodes m, nil for a nil one and never nil for another.
func (e *encoder) message(m proto.Message) []byte {
	if e.err != nil || !m.ProtoReflect().IsValid() {
		return nil
	}
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	e.err = err
	if b == nil {
		b = []byte{}
	}
	return b
}

func (e *encoder) json(w any) ([]byte, error) {
	if e.err != nil {
		return nil, fmt.Errorf("encode record: %w", e.err)
	}
	b, err := json.Marshal(w)
	if err != nil {
		return nil, fmt.Errorf("encode record: %w", err)
	}
	return b, nil
}

func decodeJSON(b []byte, w any) error {
	if len(b) > maxEncoded {
		return fmt.Errorf("%d bytes are more than the %d a record can have: %w", len(b), maxEncoded, errdefs.ErrInvalidArgument)
	}
	if err := json.Unmarshal(b, w); err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return nil
}

type decoder struct{ err error }

func decodeMessage[M any, P interface {
	*M
	proto.Message
}](d *decoder, field string, b []byte, required bool) P {
	if b == nil {
		if required && d.err == nil {
			d.err = fmt.Errorf("%s is missing: %w", field, errdefs.ErrInvalidArgument)
		}
		return nil
	}
	m := P(new(M))
	if err := proto.Unmarshal(b, m); err != nil && d.err == nil {
		d.err = fmt.Errorf("%s: %w: %w", field, err, errdefs.ErrInvalidArgument)
	}
	return m
}

func (d *decoder) check(version int, id, phase string, known bool) error {
	switch {
	case version < 1 || version > Version:
		return fmt.Errorf("version %d is not one this release knows (1 to %d): %w", version, Version, errdefs.ErrInvalidArgument)
	case !ValidID(id):
		return fmt.Errorf("ID %q is not 64 hexadecimal digits: %w", id, errdefs.ErrInvalidArgument)
	case !known:
		return fmt.Errorf("phase %q is unknown: %w", phase, errdefs.ErrInvalidArgument)
	}
	return d.err
}

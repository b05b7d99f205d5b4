package network

import (
	"math"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestBandwidthOf(t *testing.T) {
	for _, c := range []struct {
		ingress, egress string
		want            bandwidth
		bad             bool
	}{
		{},
		{ingress: "1k", want: bandwidth{IngressRate: 1000, IngressBurst: math.MaxUint32}},
		{egress: "1Ki", want: bandwidth{EgressRate: 1024, EgressBurst: math.MaxUint32}},
		{ingress: "10M", egress: "1P", want: bandwidth{1e7, math.MaxUint32, 1e15, math.MaxUint32}},
		{ingress: "999", bad: true},
		{egress: "1001T", bad: true},
		{egress: "1e30", bad: true},
		{ingress: "-1M", bad: true},
		{ingress: "0", bad: true},
		{ingress: "10Mbit", bad: true},
	} {
		notes := map[string]string{}
		if c.ingress != "" {
			notes[annotationIngress] = c.ingress
		}
		if c.egress != "" {
			notes[annotationEgress] = c.egress
		}
		got, err := bandwidthOf(notes)
		if got != c.want || c.bad != (err != nil) || (err != nil && !errdefs.IsInvalidArgument(err)) {
			t.Errorf("%v: %+v, %v, want %+v", notes, got, err, c.want)
		}
	}
	if _, err := bandwidthOf(map[string]string{annotationEgress: ""}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("empty annotation: %v", err)
	}
}

func TestPortMappings(t *testing.T) {
	for _, c := range []struct {
		in   *cri.PortMapping
		want []portMapping
		bad  string
	}{
		{in: &cri.PortMapping{ContainerPort: 80}},
		{in: &cri.PortMapping{ContainerPort: 80, HostPort: 8080}, want: []portMapping{{8080, 80, "tcp", ""}}},
		{in: &cri.PortMapping{ContainerPort: 53, HostPort: 53, Protocol: cri.Protocol_UDP, HostIp: "::1"}, want: []portMapping{{53, 53, "udp", "::1"}}},
		{in: &cri.PortMapping{ContainerPort: 9, HostPort: 9, Protocol: cri.Protocol_SCTP}, want: []portMapping{{9, 9, "sctp", ""}}},
		{in: &cri.PortMapping{ContainerPort: 80, HostPort: -1}, bad: "host_port"},
		{in: &cri.PortMapping{ContainerPort: 80, HostPort: 65536}, bad: "host_port"},
		{in: &cri.PortMapping{HostPort: 80}, bad: "container_port"},
		{in: &cri.PortMapping{ContainerPort: 80, HostPort: 80, Protocol: 7}, bad: "protocol"},
		{in: &cri.PortMapping{ContainerPort: 80, HostPort: 80, HostIp: "localhost"}, bad: "host_ip"},
	} {
		got, err := portMappings([]*cri.PortMapping{c.in})
		if c.bad != "" {
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "port_mappings[0]."+c.bad) {
				t.Errorf("%v: %v, want invalid %s", c.in, err, c.bad)
			}
			continue
		}
		if err != nil || !reflect.DeepEqual(got, c.want) {
			t.Errorf("%v: %v, %v, want %v", c.in, got, err, c.want)
		}
	}
}

func TestArgumentsRefuse(t *testing.T) {
	for _, bad := range []string{"a;K8S_POD_NAMESPACE=kube-system", "a=b", "a\n", "a\x00"} {
		for _, m := range []*cri.PodSandboxMetadata{{Name: bad}, {Namespace: bad}, {Uid: bad}} {
			if _, err := arguments("id", m); !errdefs.IsInvalidArgument(err) {
				t.Errorf("%q: %v, want invalid argument", m, err)
			}
		}
	}
}

// FuzzBandwidth: what is accepted is within the bounds.
func FuzzBandwidth(f *testing.F) {
	for _, s := range []string{"1M", "1e3", "1Ki", "-1", "0.5k", "1e99", "1e99999999", "1e-99999999", "９k", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		b, err := bandwidthOf(map[string]string{annotationIngress: s})
		if err == nil && (b.IngressRate < 1000 || b.IngressRate > 1e15) {
			t.Errorf("%q gives %d bit/s", s, b.IngressRate)
		}
	})
}

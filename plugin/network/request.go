package network

import (
	"fmt"
	"maps"
	"math"
	"net/netip"
	"strings"

	"github.com/containerd/errdefs"
	"k8s.io/apimachinery/pkg/api/resource"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Annotations, capabilities and arguments that CNI plugins know.
const (
	annotationIngress = "kubernetes.io/ingress-bandwidth"
	annotationEgress  = "kubernetes.io/egress-bandwidth"

	capPortMappings   = "portMappings"
	capBandwidth      = "bandwidth"
	capDNS            = "dns"
	capCgroupPath     = "cgroupPath"
	capPodAnnotations = "io.kubernetes.cri.pod-annotations"

	argPodNamespace = "K8S_POD_NAMESPACE"
	argPodName      = "K8S_POD_NAME"
)

type portMapping struct {
	HostPort      int32  `json:"hostPort"`
	ContainerPort int32  `json:"containerPort"`
	Protocol      string `json:"protocol"`
	HostIP        string `json:"hostIP,omitempty"`
}

type bandwidth struct {
	IngressRate  uint64 `json:"ingressRate,omitempty"`
	IngressBurst uint64 `json:"ingressBurst,omitempty"`
	EgressRate   uint64 `json:"egressRate,omitempty"`
	EgressBurst  uint64 `json:"egressBurst,omitempty"`
}

type dns struct {
	Servers  []string `json:"servers,omitempty"`
	Searches []string `json:"searches,omitempty"`
	Options  []string `json:"options,omitempty"`
}

// arguments returns what CNI_ARGS tells plugins about the pod.
func arguments(id string, m *cri.PodSandboxMetadata) ([][2]string, error) {
	args := [][2]string{
		{"IgnoreUnknown", "1"},
		{argPodNamespace, m.GetNamespace()},
		{argPodName, m.GetName()},
		{"K8S_POD_INFRA_CONTAINER_ID", id},
		{"K8S_POD_UID", m.GetUid()},
	}
	for _, a := range args {
		// A separator in a name would let it set arguments of its own.
		if strings.ContainsAny(a[1], ";=\x00\n") {
			return nil, fmt.Errorf("metadata: %s %q has a character that CNI_ARGS cannot carry: %w", a[0], a[1], errdefs.ErrInvalidArgument)
		}
	}
	return args, nil
}

// capabilities returns the capability arguments of the pod; a plugin sees
// those that its configuration asks for.
func capabilities(a Attachment) (map[string]any, error) {
	caps := map[string]any{}
	ports, err := portMappings(a.Pod.GetPortMappings())
	if err != nil {
		return nil, err
	}
	if len(ports) > 0 {
		caps[capPortMappings] = ports
	}
	limits, err := bandwidthOf(a.Pod.GetAnnotations())
	if err != nil {
		return nil, err
	}
	if limits != (bandwidth{}) {
		caps[capBandwidth] = limits
	}
	if d := a.Pod.GetDnsConfig(); d != nil {
		caps[capDNS] = dns{Servers: d.GetServers(), Searches: d.GetSearches(), Options: d.GetOptions()}
	}
	cgroup := a.CgroupParent
	if cgroup == "" {
		cgroup = a.Pod.GetLinux().GetCgroupParent()
	}
	if cgroup != "" {
		caps[capCgroupPath] = cgroup
	}
	if notes := a.Pod.GetAnnotations(); len(notes) > 0 {
		caps[capPodAnnotations] = maps.Clone(notes)
	}
	return caps, nil
}

// portMappings keeps the ports that are mapped to a host port.
func portMappings(ports []*cri.PortMapping) ([]portMapping, error) {
	var mapped []portMapping
	for i, p := range ports {
		switch {
		case p.GetHostPort() == 0:
			continue
		case p.GetHostPort() < 0 || p.GetHostPort() > math.MaxUint16:
			return nil, badPort(i, "host_port", p.GetHostPort())
		case p.GetContainerPort() < 1 || p.GetContainerPort() > math.MaxUint16:
			return nil, badPort(i, "container_port", p.GetContainerPort())
		}
		name, ok := cri.Protocol_name[int32(p.GetProtocol())]
		if !ok {
			return nil, badPort(i, "protocol", p.GetProtocol())
		}
		if ip := p.GetHostIp(); ip != "" {
			if _, err := netip.ParseAddr(ip); err != nil {
				return nil, badPort(i, "host_ip", ip)
			}
		}
		mapped = append(mapped, portMapping{
			HostPort: p.GetHostPort(), ContainerPort: p.GetContainerPort(),
			Protocol: strings.ToLower(name), HostIP: p.GetHostIp(),
		})
	}
	return mapped, nil
}

func badPort(i int, field string, value any) error {
	return fmt.Errorf("port_mappings[%d].%s: bad value %v: %w", i, field, value, errdefs.ErrInvalidArgument)
}

// Bounds of a bandwidth in bits per second, those of Kubernetes.
var (
	leastBandwidth = resource.MustParse("1k")
	mostBandwidth  = resource.MustParse("1P")
)

// Lengths of a rate that is looked at. A quantity of apimachinery is written out
// in all its digits when it is compared, which for 1e99999999 takes minutes.
const (
	longestRate     = 32
	longestExponent = len("e-99")
)

// bandwidthOf returns the limits in a pod's annotations. The burst is as large
// as the plugin takes, so that only the rate limits.
func bandwidthOf(annotations map[string]string) (bandwidth, error) {
	ingress, err := rate(annotations, annotationIngress)
	if err != nil {
		return bandwidth{}, err
	}
	egress, err := rate(annotations, annotationEgress)
	if err != nil {
		return bandwidth{}, err
	}
	var b bandwidth
	if ingress > 0 {
		b.IngressRate, b.IngressBurst = ingress, math.MaxUint32
	}
	if egress > 0 {
		b.EgressRate, b.EgressBurst = egress, math.MaxUint32
	}
	return b, nil
}

func rate(annotations map[string]string, key string) (uint64, error) {
	text, ok := annotations[key]
	if !ok {
		return 0, nil
	}
	if exponent := strings.LastIndexAny(text, "eE"); len(text) > longestRate || exponent >= 0 && len(text)-exponent > longestExponent {
		return 0, fmt.Errorf("annotation %s: %.40q has more digits than a rate in bit/s: %w", key, text, errdefs.ErrInvalidArgument)
	}
	q, err := resource.ParseQuantity(text)
	if err != nil {
		return 0, fmt.Errorf("annotation %s: %q: %w: %w", key, text, err, errdefs.ErrInvalidArgument)
	}
	if q.Cmp(leastBandwidth) < 0 || q.Cmp(mostBandwidth) > 0 {
		return 0, fmt.Errorf("annotation %s: %q is not between %v and %v bit/s: %w",
			key, text, &leastBandwidth, &mostBandwidth, errdefs.ErrInvalidArgument)
	}
	return uint64(q.Value()), nil
}

package nri

import (
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/nri/pkg/adaptation"
	"github.com/containerd/nri/pkg/api"
	"github.com/prometheus/client_golang/prometheus"
)

// metrics measures what plugins do, and remembers how each of them last failed.
type metrics struct {
	took    *prometheus.HistogramVec
	plugins prometheus.Gauge

	// count is how many plugins are connected.
	count atomic.Int64

	mu     sync.Mutex
	failed map[call]failure
}

// call is a plugin, "10-name", and what it was asked about.
type call struct{ plugin, event string }

type failure struct {
	at  time.Time
	err error
}

var _ adaptation.Metrics = (*metrics)(nil)

func newMetrics() *metrics {
	return &metrics{
		took: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "gantry_nri_request_seconds", Help: "Time that NRI plugins took, by plugin and event.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 4, 8),
		}, []string{"plugin", "event"}),
		plugins: prometheus.NewGauge(prometheus.GaugeOpts{Name: "gantry_nri_plugins", Help: "NRI plugins that are connected."}),
		failed:  map[call]failure{},
	}
}

// RecordPluginInvocation implements adaptation.Metrics.
func (m *metrics) RecordPluginInvocation(plugin, event string, err error) {
	if err == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.failed[call{plugin, event}] = failure{time.Now(), err}
}

// whose finds the plugin that an error came from.
func (m *metrics) whose(err error) (name string, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var last time.Time
	for c, f := range m.failed {
		if errors.Is(err, f.err) && f.at.After(last) {
			name, ok, last = c.plugin, true, f.at
		}
	}
	return name, ok
}

// failedSince returns why the plugin, named with or without its index, failed
// after that time when it was asked about a container to be made.
func (m *metrics) failedSince(name string, since time.Time) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for c, f := range m.failed {
		_, base, _ := strings.Cut(c.plugin, "-")
		if c.event == api.Event_CREATE_CONTAINER.PrettyName() && (c.plugin == name || base == name) && f.at.After(since) {
			return f.err
		}
	}
	return nil
}

// RecordPluginLatency implements adaptation.Metrics.
func (m *metrics) RecordPluginLatency(plugin, event string, took time.Duration) {
	m.took.WithLabelValues(plugin, event).Observe(took.Seconds())
}

// RecordPluginAdjustments implements adaptation.Metrics.
func (m *metrics) RecordPluginAdjustments(string, string, *adaptation.ContainerAdjustment, int, int) {
}

// UpdatePluginCount implements adaptation.Metrics.
func (m *metrics) UpdatePluginCount(count int) {
	m.count.Store(int64(count))
	m.plugins.Set(float64(count))
}

// Metrics are the plugins' for the daemon to register.
func (p *Plugins) Metrics() []prometheus.Collector {
	return []prometheus.Collector{p.metrics.took, p.metrics.plugins}
}

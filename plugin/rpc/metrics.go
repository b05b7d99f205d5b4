package rpc

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"

	"github.com/gantry-cri/gantry/plugin/operation"
)

// Metrics measures requests and operations under way.
type Metrics struct {
	took *prometheus.HistogramVec
	ops  *operation.Table
	age  *prometheus.Desc
}

// NewMetrics returns the metrics; they are a prometheus.Collector.
func NewMetrics(ops *operation.Table) *Metrics {
	return &Metrics{
		took: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "gantry_cri_request_seconds", Help: "Time that CRI requests took, by method and gRPC code.",
			// A list takes microseconds, a pull minutes.
			Buckets: prometheus.ExponentialBuckets(0.0005, 4, 11),
		}, []string{"method", "code"}),
		ops: ops,
		age: prometheus.NewDesc("gantry_oldest_operation_seconds",
			"How long the operation has lasted that has been at this stage the longest.", []string{"operation", "stage"}, nil),
	}
}

// Observe is Options.Observe.
func (m *Metrics) Observe(method string, code codes.Code, took time.Duration) {
	m.took.WithLabelValues(method, code.String()).Observe(took.Seconds())
}

// Describe implements prometheus.Collector.
func (m *Metrics) Describe(ch chan<- *prometheus.Desc) {
	m.took.Describe(ch)
	ch <- m.age
}

// Collect implements prometheus.Collector.
func (m *Metrics) Collect(ch chan<- prometheus.Metric) {
	m.took.Collect(ch)
	oldest := map[[2]string]time.Time{}
	for _, e := range m.ops.List() {
		key := [2]string{e.Name, e.Stage}
		if since, seen := oldest[key]; !seen || e.Since.Before(since) {
			oldest[key] = e.Since
		}
	}
	for key, since := range oldest {
		ch <- prometheus.MustNewConstMetric(m.age, prometheus.GaugeValue, time.Since(since).Seconds(), key[0], key[1])
	}
}

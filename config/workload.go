package config

import "slices"

// Workload is a kind of pods whose containers get CPU settings of the node's
// choice. A pod is one by its annotation.
type Workload struct {
	Name string
	// ActivationAnnotation is the name of that annotation. Not empty.
	ActivationAnnotation string
	// AnnotationPrefix begins annotations that change the settings for one
	// container, "" for none.
	AnnotationPrefix string
	// AllowedAnnotations are those of Allowable that have an effect in its pods,
	// besides the handler's.
	AllowedAnnotations []string
	Resources          WorkloadResources
}

// WorkloadResources are CPU settings; what is zero is left to the request.
type WorkloadResources struct {
	CPUShares int64  `json:"cpushares"`
	CPUQuota  int64  `json:"cpuquota"`
	CPUPeriod int64  `json:"cpuperiod"`
	CPUSet    string `json:"cpuset"`
	// CPULimit is in thousandths of a CPU, and says the quota.
	CPULimit int64 `json:"cpulimit"`
}

// workloads reads the table, in the order of the names.
func (w *walker) workloads(v values) (list []Workload) {
	for _, name := range v.names() {
		e := v.entry(name)
		r := values(e.table("resources"))
		out := Workload{
			Name: name, ActivationAnnotation: e.str("activation_annotation"), AnnotationPrefix: e.str("annotation_prefix"),
			AllowedAnnotations: e.list("allowed_annotations"),
			Resources: WorkloadResources{
				CPUShares: int64(r.int("cpushares")), CPUQuota: int64(r.int("cpuquota")), CPUPeriod: int64(r.int("cpuperiod")),
				CPUSet: r.str("cpuset"), CPULimit: int64(r.int("cpulimit")),
			},
		}
		w.checkWorkload(out)
		if out.ActivationAnnotation != "" {
			list = append(list, out)
		}
	}
	return list
}

func (w *walker) checkWorkload(l Workload) {
	set := l.AnnotationPrefix != "" || len(l.AllowedAnnotations) > 0 || l.Resources != WorkloadResources{}
	if l.ActivationAnnotation == "" && set {
		w.fail([]string{"workloads", l.Name, "activation_annotation"}, "is empty, so that no pod can be one")
	}
	for _, name := range l.AllowedAnnotations {
		if !slices.Contains(Allowable(), name) {
			w.fail([]string{"workloads", l.Name, "allowed_annotations"}, "%q is none of %q", name, Allowable())
		}
	}
	r := l.Resources
	for key, n := range map[string]int64{"cpushares": r.CPUShares, "cpuquota": r.CPUQuota, "cpuperiod": r.CPUPeriod, "cpulimit": r.CPULimit} {
		w.notNegative(int(n), "workloads", l.Name, "resources", key)
	}
	if r.CPULimit > 0 && r.CPUQuota > 0 {
		w.fail([]string{"workloads", l.Name, "resources", "cpulimit"}, "is set, and so is cpuquota, which it says")
	}
}

package config

import (
	"slices"
	"strings"
)

// Annotations by which who writes a pod may ask for more than the API has words
// for. Each has an effect only where a handler allows it.
const (
	// AnnotationImagePlatform names the platform of the images.
	AnnotationImagePlatform = "io.gantry.image.platform"
)

// allowable are all of them, with what they do.
var allowable = []struct{ name, does string }{
	{AnnotationImagePlatform, "takes the image for that platform, as \"linux/arm64\", out of an index, and no other in its place"},
}

// Allowable returns the names of the annotations that can be allowed.
func Allowable() (names []string) {
	for _, a := range allowable {
		names = append(names, a.name)
	}
	return names
}

// allowedDoc is the documentation of allowed_annotations.
func allowedDoc() string {
	var list []string
	for _, a := range allowable {
		list = append(list, "\""+a.name+"\" "+a.does)
	}
	return "gantry's own. Annotations by which a pod may ask for more than the API has words for, and which have no effect unless they are listed: " + strings.Join(list, "; ") + "."
}

func (w *walker) checkAllowed(h Handler) {
	for _, name := range h.AllowedAnnotations {
		if !slices.Contains(Allowable(), name) {
			w.fail([]string{"containerd", "runtimes", h.Name, "allowed_annotations"}, "%q is none of %q", name, Allowable())
		}
	}
}

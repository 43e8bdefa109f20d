#!/usr/bin/env bash
# The image as one file for clusters, made once and put where all nodes see it:
#
#   docker/convert.sh sif  pipeline /shared/pipeline.sif     # Apptainer (1.2 or newer)
#   docker/convert.sh sqsh pipeline /shared/pipeline.sqsh    # enroot, pyxis
#
# ENGINE=podman where the image is podman's. The file is whole or absent.
set -euo pipefail

usage() {
    sed -n '4,5s/^# *//p' "$0" >&2
    exit 2
}
[ $# -eq 3 ] || usage
kind=$1 image=$2 output=$3 engine=${ENGINE:-docker}
case $kind in
sif) tool=apptainer ;;
sqsh) tool=enroot ;;
*) usage ;;
esac
case $engine in
docker) scheme=dockerd ;;
podman) scheme=podman ;;
*)
    echo "convert: ENGINE = $engine is not known; choose docker or podman" >&2
    exit 2
    ;;
esac
for needed in "$tool" "$engine"; do
    command -v "$needed" >/dev/null || {
        echo "convert: $needed is not found; install it here, or convert where it is" >&2
        exit 2
    }
done
"$engine" image inspect "$image" >/dev/null 2>&1 || {
    echo "convert: $engine has no image $image; build it: $engine build -f docker/Dockerfile -t $image ." >&2
    exit 2
}
[ ! -e "$output" ] || {
    echo "convert: $output is there already; remove it, or choose another name" >&2
    exit 2
}

# Beside the output, where there is room for it.
work=$(mktemp -d "$(dirname "$output")/.convert-XXXXXX")
trap 'rm -rf "$work"' EXIT
if [ "$kind" = sif ]; then
    "$engine" save --output "$work/image.tar" "$image"
    apptainer build --build-arg "archive=$work/image.tar" "$work/made" "$(dirname "$0")/apptainer.def"
else
    enroot import --output "$work/made" "$scheme://$image"
fi
mv -n "$work/made" "$output"
echo "$output"

# Sourced by the scripts of this folder, which have set `root`, the repository.
# shellcheck shell=bash

# The interpreter that `make setup` has made; VENV as in the Makefile.
# shellcheck disable=SC2154
venv=${VENV:-.venv}
[[ $venv = /* ]] || venv=$root/$venv
python=$venv/bin/python

say() { printf '%s %s\n' "$(date +%H:%M:%S)" "$*"; }

# Words as a shell takes them, to be pasted.
quoted() {
  local word words=()
  for word; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word=${word@Q}
    words+=("$word")
  done
  printf '%s\n' "${words[*]}"
}

# What a user can mend: one line, exit code 2, as pipeline/run.py does it.
refuse() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# Fills the map `recipe` from slurm/recipe.py for the given overrides; fails with its exit code, and
# then has what was found before the error.
declare -A recipe
read_recipe() {
  local text key value code=0
  [[ -x $python ]] || refuse "$python: is not there; run make setup in $root, or set VENV"
  text=$("$python" "$root/slurm/recipe.py" "$@") || code=$?
  while IFS=$'\t' read -r key value; do [[ -z $key ]] || recipe[$key]=$value; done <<<"$text"
  return "$code"
}

# A folder that cannot be written is told now, and not after hours of training.
check_writable() {
  local folder=$1
  mkdir -p "$folder" 2>/dev/null || true
  [[ -d $folder && -w $folder ]] ||
    refuse "outputs: $folder cannot be written by $(id -un) on $(hostname); it must be on a" \
      "disk that every node shares; set outputs=OTHER_FOLDER"
}

# The newest Slurm job of a stage, noted beside the stage's folder: a run that shares data_prep or
# convert with another finds the other's job there.
job_of() { tail -n 1 "${recipe[$1.folder]}.job" 2>/dev/null || true; }

# pyxis' flags (an srun plugin) where the cluster runs jobs in a container; else none.
container=()
read_container() {
  local image=${recipe[cluster.container_image]} mounts=${recipe[cluster.container_mounts]}
  local outputs=${recipe[outputs]}
  [[ -n $image ]] || return 0
  # A registry's image has a scheme or no slash at its beginning; a file begins with one.
  [[ $image != /* || -e $image ]] ||
    refuse "cluster.container_image=$image: is not there; it must be an image file that every" \
      "node sees, or a registry's name; set it, or null for none"
  srun --help | grep -q -- --container-image ||
    refuse "cluster.container_image=$image: this Slurm has no pyxis, and so no" \
      "--container-image; ask the site for it, or set cluster.container_image=null"
  container=(--container-image="$image" --container-workdir="$root")
  # All outputs: stages share artifacts/ and .locks/ beside the run's own folder.
  container+=(--container-mounts="$root:$root,$outputs:$outputs${mounts:+,$mounts}")
}

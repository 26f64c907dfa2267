#!/usr/bin/env bash
# DVC 3.67.1, Python 3.11: a stage with one cached output and one metric of `cache: false`, a remote that is a plain folder.
# Expected (our guess): after `dvc push --run-cache` here, `dvc repro --pull` in another clone of the same commit takes the stage
# from the run cache and runs nothing; the metric is in the run cache's entry, and was put into the local cache for that purpose.
# Seen: the push leaves out the metric's file. The other clone has the entry, does not find the metric, warns "Some of the cache
# files do not exist neither locally nor on remote", and runs the stage again. Without the metric (second round below) the stage is
# taken from the run cache. `dvc pull --run-cache` helps neither: of files it fetches those alone that dvc.lock names.
# Exits 1 once that is no longer so.
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
python3.11 -m venv "$room/venv"
"$room/venv/bin/pip" install --quiet --disable-pip-version-check dvc==3.67.1
export PATH="$room/venv/bin:$PATH" DVC_NO_ANALYTICS=true
git config --file "$room/gitconfig" user.name nobody && git config --file "$room/gitconfig" user.email nobody@example.com
export GIT_CONFIG_GLOBAL="$room/gitconfig"

round() { # of an `outs` or `metrics` entry for the second file -> how the stage came about in the other clone
    rm -rf "$room/here" "$room/there" "$room/store"
    mkdir "$room/here" && cd "$room/here"
    git init -q && dvc init -q && dvc remote add -q -d store "$room/store"
    printf 'stages:\n  train:\n    cmd: echo paid; echo model > model; echo {} > scores.json\n    deps: [data]\n    outs: [model]\n    %s\n' "$1" > dvc.yaml
    echo data > data
    git add -A && git commit -qm "nothing was run yet"
    git clone -q . "$room/there"
    dvc repro -q > "$room/first" && dvc push -q --run-cache
    cd "$room/there" && dvc repro --pull > "$room/second" 2>&1
    if grep -qx paid "$room/second"; then echo "run again"; else echo "from the run cache"; fi
}

with=$(round 'metrics: [{scores.json: {cache: false}}]')
without=$(round '')
echo "with a metric of cache: false: $with; without: $without"
[ "$with" = "run again" ] && [ "$without" = "from the run cache" ]

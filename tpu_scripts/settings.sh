# The settings of all scripts here. One of them can also be given for one call, by an environment variable of its name
# (ZONE=europe-west4-b tpu_scripts/create), and several by a second file like this one (SETTINGS=mine.sh tpu_scripts/create).
# shellcheck shell=bash disable=SC2034,SC2154

PROJECT=""             # Google Cloud project; empty: the one that gcloud is set to
ZONE=us-west4-a        # `gcloud compute tpus accelerator-types list --zone=ZONE` shows what a zone has
BUCKET=""              # gs://NAME, in the same region: everything that outlives a slice lies there, in a folder TPU_NAME
TPU_NAME=bigflax       # of the slice and its folder; another run is another name

TOPOLOGY=v5e:4x4       # as in `bigflax plan --topology`: v4, v5e, v5p, v6e or tpu7x, and the chips along each side
SLICES=1               # several slices are one run over the data-center network
PROVISIONING=spot      # spot (cheap, taken away at any time, watch brings it back), on-demand or reserved
RUNTIME=""             # the machines' image; empty: the one of the generation (common.sh has the table)

CONFIG=gpt2_124m       # a recipe's name or file, as in `bigflax train --config`
PACKAGE=$here/..       # what is installed: a folder or wheel of bigflax (this one), or a requirement as pip takes it

WAIT_HOURS=24          # how long to queue for a slice
POLL_SECONDS=60        # how often watch looks
LOG_SECONDS=60         # how often a worker copies its log to the bucket
RETRIES=3              # crashes in a row, none of them after half an hour of training, after which watch gives up
WHEN_OVER=keep         # what watch does with the slice when the run is over, well or not: keep it (and pay), or delete it

CLUSTER=""             # of the gke and xpk scripts: the name of a GKE cluster
IMAGE=python:3.12      # of the same: a container image; with PACKAGE="" nothing is installed into it at the start

from tasks.core.shell import main
from tasks.pretrain_load import stage

main(stage)

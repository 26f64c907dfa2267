from tasks.core.shell import main
from tasks.cache_learn import stage

main(stage)

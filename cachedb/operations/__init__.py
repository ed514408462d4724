"""Operations on a cache, one module for each verb."""
